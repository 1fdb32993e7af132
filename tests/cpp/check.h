// What the C++ tests share: random numbers, errors in ulp against long double, and a tally.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <random>

#include "common/macros.h"

// One instruction set per program, the one given by -march, instead of the best of the clones.
#ifdef GDBP_TEST_ONE_TARGET
#undef GDBP_CLONES
#undef GDBP_HAS_CLONES
#define GDBP_CLONES
#endif

namespace check {

inline int failures = 0;

// Units in the last place of T at `reference`; subnormals share the smallest.
template <class T>
long double ulp(long double reference) {
  using Limits = std::numeric_limits<T>;
  const long double magnitude = std::fabs(reference);
  const int exponent = magnitude == 0 ? Limits::min_exponent - 1 : std::ilogb(magnitude);
  const int lowest = Limits::min_exponent - 1, highest = Limits::max_exponent - 1;
  const int clamped = exponent < lowest ? lowest : exponent > highest ? highest : exponent;
  return std::ldexp(1.0L, clamped - (Limits::digits - 1));
}

// |actual - reference| in ulp. Beyond the largest finite T stands infinity, at the power of two that would
// follow. NaN, infinite and zero references want the like, with the sign.
template <class T>
double ulp_error(T actual, long double reference) {
  const double wrong = std::numeric_limits<double>::infinity();
  if (std::isnan(reference) || std::isnan(actual)) {
    return std::isnan(reference) && std::isnan(actual) ? 0 : wrong;
  }
  if (std::isinf(reference)) return actual == reference ? 0 : wrong;
  if (reference == 0) return actual == 0 && std::signbit(actual) == std::signbit(reference) ? 0 : wrong;
  const long double beyond = std::ldexp(1.0L, std::numeric_limits<T>::max_exponent);
  const long double shown = std::isinf(actual) ? std::copysign(beyond, (long double)actual) : actual;
  const long double wanted = std::fabs(reference) > beyond ? std::copysign(beyond, reference) : reference;
  return double(std::fabs(shown - wanted) / ulp<T>(wanted));
}

// An error in units of the last place of the largest term of a sum, where terms may cancel.
template <class T>
double error_against(T actual, long double reference, std::initializer_list<long double> terms) {
  long double scale = std::fabs(reference);
  for (long double term : terms) scale = std::max(scale, std::fabs(term));
  return double(std::fabs(actual - reference) / ulp<T>(scale));
}

inline double uniform(double low, double high) {
  static std::mt19937_64 generator(0);
  return std::uniform_real_distribution<double>(low, high)(generator);
}

// The largest error seen, and where.
struct Worst {
  double error = 0, where = 0;
  void see(double e, double x) {
    if (!(e <= error)) error = e, where = x;
  }
};

inline void report(const char* name, const char* type, const Worst& worst, double bound) {
  const bool good = worst.error <= bound;
  failures += !good;
  std::printf("%-26s %-8s max %6.3f ulp, bound %5.2f, at %.17g%s\n", name, type, worst.error, bound, worst.where,
              good ? "" : "  FAILED");
}

inline int finish() {
  std::printf("%s\n", failures == 0 ? "all within bounds" : "FAILED");
  return failures != 0;
}

template <class T>
constexpr const char* type_name = sizeof(T) == 4 ? "float" : "double";

}  // namespace check
