// The conversions of common/dtype.h against the definition of the formats, evaluated in double: all 65536
// patterns widened; every value, every midpoint, and their float neighbours narrowed.
#include <algorithm>
#include <vector>

#include "check.h"
#include "common/dtype.h"

using gdbp::BFloat16;
using gdbp::Float16;

template <class H>
struct Layout;
template <>
struct Layout<BFloat16> {
  static constexpr const char* name = "bfloat16";
  static constexpr int exponent_bits = 8, mantissa_bits = 7;
};
template <>
struct Layout<Float16> {
  static constexpr const char* name = "float16";
  static constexpr int exponent_bits = 5, mantissa_bits = 10;
};

template <class H>
double decode(uint16_t bits) {
  using L = Layout<H>;
  const int bias = (1 << (L::exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7fff) >> L::mantissa_bits;
  const int mantissa = bits & ((1 << L::mantissa_bits) - 1);
  double magnitude;
  if (exponent == (1 << L::exponent_bits) - 1) {
    magnitude = mantissa != 0 ? NAN : INFINITY;
  } else {
    const int hidden = exponent != 0 ? 1 << L::mantissa_bits : 0;
    magnitude = std::ldexp(hidden + mantissa, (exponent != 0 ? exponent : 1) - bias - L::mantissa_bits);
  }
  return std::copysign(magnitude, bits & 0x8000 ? -1.0 : 1.0);
}

// The nearest value of the format, ties to even, by rounding a multiple of its last place.
template <class H>
double nearest(double x) {
  using L = Layout<H>;
  if (std::isnan(x) || std::isinf(x) || x == 0) return x;
  const int bias = (1 << (L::exponent_bits - 1)) - 1;
  const int exponent = std::max(std::ilogb(x), 1 - bias);
  const double place = std::ldexp(1.0, exponent - L::mantissa_bits);
  const double rounded = std::nearbyint(x / place) * place;
  return std::fabs(rounded) >= std::ldexp(1.0, bias + 1) ? std::copysign(INFINITY, x) : rounded;
}

template <class To, class From, class F>
GDBP_CLONES void loop(const F f, const From* x, To* y, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) y[i] = f(x[i]);
}

bool same(double a, double b) {
  return std::signbit(a) == std::signbit(b) && (a == b || (std::isnan(a) && std::isnan(b)));
}

void report(const char* type, const char* what, size_t cases, size_t wrong, double where) {
  check::failures += wrong != 0;
  std::printf("%-9s %-7s %8zu cases, %zu wrong", type, what, cases, wrong);
  std::printf(wrong != 0 ? ", last at %.17g  FAILED\n" : "\n", where);
}

template <class H>
void test() {
  std::vector<H> patterns;
  for (int bits = 0; bits < 65536; ++bits) patterns.push_back({uint16_t(bits)});
  std::vector<float> wide(patterns.size());
  loop([](H h) __attribute__((always_inline)) { return gdbp::widen(h); }, patterns.data(), wide.data(), 65536);
  size_t wrong = 0;
  double where = 0;
  for (int bits = 0; bits < 65536; ++bits) {
    if (!same(wide[bits], decode<H>(uint16_t(bits)))) ++wrong, where = bits;
  }
  report(Layout<H>::name, "widen", patterns.size(), wrong, where);

  std::vector<float> x;
  for (int bits = 0; bits < 65536; ++bits) {
    const double value = decode<H>(uint16_t(bits));
    double next = decode<H>(uint16_t(bits + 1));
    // The largest finite value meets infinity halfway to the power of two that would follow it.
    if (std::isinf(next)) next = 2 * value - decode<H>(uint16_t(bits - 1));
    for (const float center : {float(value), float((value + next) / 2)}) {
      x.push_back(center);
      x.push_back(std::nextafter(center, INFINITY));
      x.push_back(std::nextafter(center, -INFINITY));
    }
  }
  for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += 4099) x.push_back(gdbp::bit_cast<float>(uint32_t(bits)));
  for (uint32_t payload : {1u, 0x1000u, 0x1fffu, 0xffffu, 0x10000u, 0x3fffffu, 0x400000u, 0x7fffffu}) {
    x.push_back(gdbp::bit_cast<float>(0x7f800000u | payload));
    x.push_back(gdbp::bit_cast<float>(0xff800000u | payload));
  }
  std::vector<H> half(x.size());
  loop([](float v) __attribute__((always_inline)) { return gdbp::narrow<H>(v); }, x.data(), half.data(),
       int64_t(x.size()));
  wrong = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    if (!same(decode<H>(half[i].bits), nearest<H>(x[i]))) ++wrong, where = x[i];
  }
  report(Layout<H>::name, "narrow", x.size(), wrong, where);
}

int main() {
  test<BFloat16>();
  test<Float16>();
  return check::finish();
}
