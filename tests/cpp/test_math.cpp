// common/math.h against the long double functions of libm, in ulp: all bit patterns in strides, a dense
// sweep where the function does its work, and the edges.
#include <cstring>
#include <vector>

#include "check.h"
#include "common/math.h"

namespace math = gdbp::math;
using real = long double;

// sqrt(1/2) to twice the digits of long double, as its rounding error grows with the square of x below.
const real kRoot = std::sqrt(0.5L);
const real kRootRest = std::fma(-kRoot, kRoot, 0.5L) / (2 * kRoot);
const real kPi = 3.14159265358979323846264338327950288L;

real normal_cdf(real x) {
  const real z = -x * kRoot;
  if (std::isnan(x) || std::isinf(x) || std::fabs(x) > 60) return x > 0 ? 1 : x < 0 ? 0 : x;
  const real rest = std::fma(-x, kRoot, -z) - x * kRootRest;
  return 0.5L * (std::erfc(z) - 2 / std::sqrt(kPi) * std::exp(-z * z) * rest);
}
real normal_pdf(real x) {
  if (std::isnan(x)) return x;
  if (std::fabs(x) > 60) return 0;
  const real square = x * x;
  return std::exp(-square / 2) * (1 - std::fma(x, x, -square) / 2) / std::sqrt(2 * kPi);
}
real sigmoid(real x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }

// NAME, reference, bound in ulp, and the interval of the dense sweep for float and for double
#define FUNCTIONS(ROW)                            \
  ROW(abs, std::fabs, 0, -2, 2, -2, 2)            \
  ROW(sqrt, std::sqrt, 0.5001, 0, 4, 0, 4)        \
  ROW(exp, std::exp, 2, -105, 90, -750, 712)      \
  ROW(log, std::log, 2, 0, 4, 0, 4)               \
  ROW(log1p, std::log1p, 2, -1.01, 3, -1.01, 3)   \
  ROW(expm1, std::expm1, 2, -3, 3, -3, 3)         \
  ROW(sigmoid, sigmoid, 2, -105, 20, -750, 40)    \
  ROW(tanh, std::tanh, 2, -2, 10, -2, 20)         \
  ROW(erf, std::erf, 2, -2, 5, -2, 7)             \
  ROW(normal_cdf, normal_cdf, 4, -15, 7, -39, 10) \
  ROW(normal_pdf, normal_pdf, 4, -15, 15, -39, 39)

template <class F, class T>
GDBP_CLONES void loop(const F f, const T* x, T* y, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) y[i] = f(x[i]);
}

template <class T>
std::vector<T> inputs(double low, double high) {
  using Bits = typename math::Format<T>::Bits;
  using Limits = std::numeric_limits<T>;
  std::vector<T> x;
  // Odd strides visit all exponents, signs and kinds of NaN.
  const int patterns = 1 << 19, points = 1 << 19;
  const Bits stride = Bits(~Bits(0) / patterns) | 1;
  for (int i = 0; i < patterns; ++i) x.push_back(gdbp::bit_cast<T>(Bits(i * stride)));
  for (int i = 0; i <= points; ++i) x.push_back(T(low + (high - low) * i / points));
  // Small arguments of both signs, logarithmically.
  for (int i = 0; i < 1 << 17; ++i) x.push_back(T(std::ldexp(i % 2 ? -1.0 : 1.0, -60) * std::exp2(i / 2000.0)));
  for (T edge : {T(0), T(1), T(0.5), T(2), T(0.625), T(1.4142135), T(0.70710678), T(20), T(40), T(88.7228394),
                 T(709.78271289338397), T(-103.97208), T(-745.13321910194122), Limits::min(), Limits::denorm_min(),
                 Limits::max(), Limits::epsilon(), Limits::infinity(), Limits::quiet_NaN()}) {
    for (T sign : {T(1), T(-1)}) {
      x.push_back(sign * edge);
      x.push_back(std::nextafter(sign * edge, T(0)));
      x.push_back(std::nextafter(sign * edge, Limits::infinity()));
      x.push_back(std::nextafter(sign * edge, -Limits::infinity()));
    }
  }
  return x;
}

template <class T, class F>
void test(const char* name, F f, real (*reference)(real), double bound, double low, double high) {
  const std::vector<T> x = inputs<T>(low, high);
  std::vector<T> y(x.size());
  loop(f, x.data(), y.data(), int64_t(x.size()));
  check::Worst worst;
  for (size_t i = 0; i < x.size(); ++i) worst.see(check::ulp_error(y[i], reference(x[i])), double(x[i]));
  check::report(name, check::type_name<T>, worst, bound);
}

// In the order of the arguments, results must not step back by more than their errors explain; where exp
// runs out of range it must fall to 0 and rise to infinity for good.
template <class T>
void test_range() {
  T last = 0;
  bool monotone = true;
  for (double x = -800; x < 800; x += 0.00390625) {
    const T y = math::exp(T(x));
    monotone &= y >= last * (1 - 2 * std::numeric_limits<T>::epsilon());
    last = y;
  }
  const bool good = monotone && std::isinf(last) && math::exp(T(-800)) == 0;
  check::failures += !good;
  std::printf("%-26s %-8s %s\n", "exp is monotone", check::type_name<T>, good ? "yes" : "no  FAILED");
}

// exp, for all that this is made for.
template <class T>
void test_nonpositive() {
  std::vector<T> x;
  for (T value : inputs<T>(-760, 0))
    if (!(value > 0)) x.push_back(value);
  std::vector<T> y(x.size());
  loop([](auto v) __attribute__((always_inline)) { return math::exp_of_nonpositive(v); }, x.data(), y.data(), x.size());
  check::Worst worst;
  for (size_t i = 0; i < x.size(); ++i) worst.see(check::ulp_error(y[i], std::exp(real(x[i]))), double(x[i]));
  check::report("exp_of_nonpositive", check::type_name<T>, worst, 1.5);
}

int main() {
#define ROW(NAME, REFERENCE, BOUND, LOW_F, HIGH_F, LOW_D, HIGH_D)                       \
  {                                                                                     \
    const auto f = [](auto x) __attribute__((always_inline)) { return math::NAME(x); }; \
    const auto reference = [](real x) -> real { return REFERENCE(x); };                 \
    test<float>(#NAME, f, reference, BOUND, LOW_F, HIGH_F);                             \
    test<double>(#NAME, f, reference, BOUND, LOW_D, HIGH_D);                            \
  }
  FUNCTIONS(ROW)
#undef ROW
  test_range<float>();
  test_range<double>();
  test_nonpositive<float>();
  test_nonpositive<double>();
  return check::finish();
}
