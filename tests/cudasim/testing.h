// What the test programs share: cases chosen by name, run under every schedule; arrays of any element type,
// at odd addresses and with guarded ends; comparison in units of the last place.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "cudasim.h"

inline const char* schedule_name = "";
inline std::string context;  // what is being tried, for the message

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "%s schedule, %s: %s\n", schedule_name, context.c_str(), what.c_str());
  std::exit(1);
}
inline void expect(bool condition, const std::string& what) {
  if (!condition) fail(what);
}

struct Case {
  const char* name;
  void (*run)();
};

// argv: the case's name.
template <size_t n>
int run_cases(int argc, char** argv, const Case (&cases)[n]) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  for (const Case& c : cases) {
    if (wanted != c.name) continue;
    using cudasim::Schedule;
    const struct {
      Schedule schedule;
      const char* name;
    } schedules[] = {{Schedule::forward, "forward"}, {Schedule::reverse, "reverse"}, {Schedule::random, "random"}};
    try {
      for (const auto& s : schedules) {
        cudasim::set_schedule(s.schedule, 2024);
        schedule_name = s.name;
        context = c.name;
        c.run();
      }
    } catch (const cudasim::Error& error) {
      std::fprintf(stderr, "%s\n", error.what());
      return 2;
    }
    return 0;
  }
  std::fprintf(stderr, "no case named \"%s\"\n", wanted.c_str());
  return 64;
}

namespace gdbp {

constexpr Dtype kDtypes[] = {Dtype::float64, Dtype::float32, Dtype::bfloat16, Dtype::float16};
constexpr const char* kDtypeNames[] = {"float64", "float32", "bfloat16", "float16"};

inline double epsilon(Dtype dtype) {
  constexpr double values[] = {0x1p-52, 0x1p-23, 0x1p-7, 0x1p-10};
  return values[int(dtype)];
}

// `size` elements, `offset` elements behind a 16-byte boundary. The memory ends with the last element, so
// that the address sanitizer sees the first access beyond it.
class Array {
 public:
  Array(Dtype dtype, int64_t size, int64_t offset = 0)
      : dtype_(dtype), size_(size), skip_(offset * size_of(dtype)), bytes_(skip_ + size * size_of(dtype), 0xff) {}

  Array(Dtype dtype, int64_t size, int64_t offset, std::mt19937& generator, double low, double high)
      : Array(dtype, size, offset) {
    std::uniform_real_distribution<double> draw(low, high);
    for (int64_t i = 0; i < size; ++i) set(i, draw(generator));
  }

  void* data() { return bytes_.data() + skip_; }
  const void* data() const { return bytes_.data() + skip_; }
  int64_t size() const { return size_; }
  Dtype dtype() const { return dtype_; }

  double get(int64_t i) const {
    return dispatch(dtype_, [&](auto tag) {
      typename decltype(tag)::type x;
      std::memcpy(&x, at(i), sizeof(x));
      return double(widen(x));
    });
  }
  void set(int64_t i, double value) {
    dispatch(dtype_, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const T x = narrow<T>(Compute<T>(value));
      std::memcpy(const_cast<unsigned char*>(at(i)), &x, sizeof(x));
    });
  }

 private:
  const unsigned char* at(int64_t i) const { return bytes_.data() + skip_ + i * size_of(dtype_); }
  Dtype dtype_;
  int64_t size_, skip_;
  std::vector<unsigned char> bytes_;
};

// Between neighbours among the smallest numbers.
inline double smallest(Dtype dtype) {
  constexpr double values[] = {0x1p-1074, 0x1p-149, 0x1p-133, 0x1p-24};
  return values[int(dtype)];
}

// Element by element: equal, both NaN, or no further apart than `ulps` units of the last place of the larger
// of the expected value and `scale`.
inline void expect_close(const Array& got, const Array& expected, double ulps, double scale, const char* what) {
  for (int64_t i = 0; i < expected.size(); ++i) {
    const double a = got.get(i), b = expected.get(i);
    if (a == b || (a != a && b != b)) continue;
    const double unit = std::max(epsilon(expected.dtype()) * std::max(std::abs(b), scale), smallest(expected.dtype()));
    if (std::abs(a - b) <= ulps * unit) continue;
    char text[160];
    std::snprintf(text, sizeof(text), "%s[%lld] is %.17g, expected %.17g", what, (long long)i, a, b);
    fail(text);
  }
}

}  // namespace gdbp
