// Elementary functions for float and double, the same source on the host and on the device. They are
// straight-line code (selects only: no branch, no table, no call), so that a loop over them vectorises for
// every clone. Nothing here relies on -ffast-math, or on a fused multiply-add being there or not.
//
// NaN gives NaN; infinities, signed zeros, overflow and underflow give what IEEE 754 and libm give.
// Largest errors, as tests/cpp/test_math.cpp holds them: 2 ulp, and 4 ulp for the normal distribution.
//
// The polynomials interpolate their functions in Chebyshev nodes, solved with 60 digits. Range reductions:
// Cody and Waite, Software Manual for the Elementary Functions, 1980; Tang, ACM TOMS 15 and 16, 1989-90.
#pragma once
#include <math.h>

#include <cstdint>
#include <limits>

#include "common/dtype.h"
#include "common/macros.h"

namespace gdbp::math {

template <class T>
struct Format;

template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr Bits one = 0x3f800000, root_half = 0x3f3504f3, mantissa = 0x007fffff, upper_half = 0xfffff000;
  static constexpr float smallest_normal = 0x1p-126f, infinity = std::numeric_limits<float>::infinity();
  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits of the sum.
  static constexpr float shifter = 0x1.8p23f;
  // ln2_hi is short enough for its product with any exponent to be exact.
  static constexpr float ln2_hi = 0.693145751953125f, ln2_lo = 1.42860677e-06f;
  // Where exp has long become 0 and infinity, and exp(-x^2 / 2) has become 0.
  static constexpr float exp_min = -105, exp_max = 89, normal_max = 15;
};

template <>
struct Format<double> {
  using Bits = uint64_t;
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr Bits one = 0x3ff0000000000000, root_half = 0x3fe6a09e667f3bcd, mantissa = 0x000fffffffffffff,
                        upper_half = 0xfffffffff8000000;
  static constexpr double smallest_normal = 0x1p-1022, infinity = std::numeric_limits<double>::infinity();
  static constexpr double shifter = 0x1.8p52;
  static constexpr double ln2_hi = 0x1.62e42fefa4p-1, ln2_lo = -1.7239444525614835e-13;
  static constexpr double exp_min = -746, exp_max = 710, normal_max = 40;
};

template <class T>
constexpr bool is_float = sizeof(T) == 4;
template <class T>
constexpr T half_epsilon = std::numeric_limits<T>::epsilon() / 2;
template <class T>
constexpr T not_a_number = std::numeric_limits<T>::quiet_NaN();

GDBP_HD float abs(float x) { return ::fabsf(x); }
GDBP_HD double abs(double x) { return ::fabs(x); }
GDBP_HD float copysign(float magnitude, float sign) { return ::copysignf(magnitude, sign); }
GDBP_HD double copysign(double magnitude, double sign) { return ::copysign(magnitude, sign); }
GDBP_HD float sqrt(float x) { return ::sqrtf(x); }
GDBP_HD double sqrt(double x) { return ::sqrt(x); }

// 0 for a subnormal number. A matrix product with 1 % of them among its factors takes a CPU three times as long, and
// 1e-38 more or less is nothing to a gradient.
template <class T>
GDBP_HD T normal(T x) {
  return abs(x) < Format<T>::smallest_normal ? T(0) : x;
}

// Written so that NaN passes.
template <class T>
GDBP_HD T at_most(T x, T limit) {
  return x > limit ? limit : x;
}
template <class T>
GDBP_HD T at_least(T x, T limit) {
  return x < limit ? limit : x;
}

// c + x * (next + x * (...)), lowest power first
template <class T>
GDBP_HD T polynomial(T, T c) {
  return c;
}
template <class T, class... Rest>
GDBP_HD T polynomial(T x, T c, Rest... rest) {
  return c + x * polynomial(x, rest...);
}

// x with the lower half of its digits cleared: the product of two such numbers is exact.
template <class T>
GDBP_HD T upper_half(T x) {
  using F = Format<T>;
  return bit_cast<T>(typename F::Bits(bit_cast<typename F::Bits>(x) & F::upper_half));
}

template <class T>
GDBP_HD T nearest_integer(T x) {
  return (x + Format<T>::shifter) - Format<T>::shifter;
}

// 2^(n + more) for an integer in the range of normal exponents. A conversion to int64 would not vectorise below
// AVX-512; the low bits of n + shifter are that conversion.
template <class T>
GDBP_HD T power_of_two(T n, T more = T(0)) {
  using F = Format<T>;
  const auto bits = bit_cast<typename F::Bits>(n + (F::shifter + F::bias + more));
  return bit_cast<T>(typename F::Bits(bits << F::mantissa_bits));
}

// Powers of two down to the smallest subnormal number are formed this much larger, as normal numbers, and multiplied by
// the second of these last.
template <class T>
constexpr T below_one = is_float<T> ? T(64) : T(256);
template <class T>
constexpr T back_below_one = is_float<T> ? T(0x1p-64) : T(0x1p-256);

// An exponential as 2^exponent (1 + excess), |excess| < 1/2.
template <class T>
struct Exponential {
  T excess, exponent;
  // factor * exp(...), with one rounding less than a product, and none more where it is subnormal
  GDBP_HD T times(T factor) const {
    const T half = nearest_integer(exponent * T(0.5));
    return (factor + factor * excess) * power_of_two(half) * power_of_two(exponent - half);
  }
  // The same, a few operations less, for exponents <= 0: of the two powers one is always the same, and the product with
  // the other is always normal as long as the factor is above 2^-8.
  GDBP_HD T times_below_one(T factor) const {
    return (factor + factor * excess) * power_of_two(exponent, below_one<T>) * back_below_one<T>;
  }
};

// (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2
template <class T>
GDBP_HD T exp_tail(T r) {
  if constexpr (is_float<T>) {
    return polynomial(r, 0.5f, 0.166665763f, 0.0416665561f, 0.0083632031f, 0.00139262131f);
  } else {
    return polynomial(r, 0.5, 0.16666666666666671, 0.041666666666666671, 0.0083333333333260699, 0.0013888888888883703,
                      0.00019841269875048905, 2.4801587325710759e-05, 2.7557255110978891e-06, 2.7557273436570488e-07,
                      2.5105337244665209e-08, 2.0914772832248089e-09);
  }
}

// exp(high + low), low being the part of the argument that does not fit in T. A low of -0 costs nothing:
// it is the zero that a compiler may leave out of a sum.
template <class T>
GDBP_HD Exponential<T> exp_of_sum(T high, T low) {
  using F = Format<T>;
  const T n = nearest_integer((high + low) * T(1.4426950408889634));
  const T r = (high - n * F::ln2_hi) + (low - n * F::ln2_lo);
  return {r + r * r * exp_tail(r), n};
}

template <class T>
GDBP_HD T exp(T x) {
#ifdef __CUDA_ARCH__
  // 1 ulp, in a third of the instructions: an approximation of 2^x is one of them.
  if constexpr (is_float<T>) return ::expf(x);
#endif
  return exp_of_sum(at_least(at_most(x, Format<T>::exp_max), Format<T>::exp_min), T(-0.0)).times(T(1));
}

// exp(x) for x <= 0, a third cheaper
template <class T>
GDBP_HD T exp_of_nonpositive(T x) {
#ifdef __CUDA_ARCH__
  if constexpr (is_float<T>) return ::expf(x);
#endif
  using F = Format<T>;
  const T y = at_least(x, F::exp_min);
  // n and, in the low bits of the sum, the biased exponent of a normal number.
  constexpr T offset = F::shifter + F::bias + below_one<T>;
  const T sum = y * T(1.4426950408889634) + offset, n = sum - offset;
  const T r = (y - n * F::ln2_hi) - n * F::ln2_lo;
  const T power = bit_cast<T>(typename F::Bits(bit_cast<typename F::Bits>(sum) << F::mantissa_bits));
  return (T(1) + r * (T(1) + r * exp_tail(r))) * power * back_below_one<T>;
}

// exp(x) - 1 = 2^n (exp(r) - 1) + (2^n - 1), of which half is formed, as 2^n itself may overflow. The
// rounding error of r is kept: where n = 1 the terms cancel and would magnify it.
template <class T>
GDBP_HD T expm1(T x) {
  using F = Format<T>;
  const T y = at_least(at_most(x, F::exp_max), T(-40));
  const T n = nearest_integer(y * T(1.4426950408889634));
  const T high = y - n * F::ln2_hi, low = n * F::ln2_lo;
  const T r = high - low;
  const T p = r + (r * r * exp_tail(r) + ((high - r) - low));
  const T scale = power_of_two(n - T(1));
  const T result = T(2) * (scale * p + (scale - T(0.5)));
  return abs(x) < half_epsilon<T> ? x : result;
}

// log(u + c) for a finite u > 0 and a correction |c / u| <= epsilon, given as c / u. With u = 2^k m and
// s = (m - 1) / (m + 1), log(m) = 2 s + s R(s^2).
template <class T>
GDBP_HD T log_of_sum(T u, T correction) {
  using F = Format<T>;
  using Bits = typename F::Bits;
  const bool subnormal = u < F::smallest_normal;
  const T normal = subnormal ? u * T(Bits(2) << F::mantissa_bits) : u;
  // Counted from sqrt(1/2), so that m is in [sqrt(1/2), sqrt(2)) and k is 0 around 1.
  const Bits bits = bit_cast<Bits>(normal) + (F::one - F::root_half);
  const T m = bit_cast<T>(Bits((bits & F::mantissa) + F::root_half));
  const T integer = T(Bits(1) << F::mantissa_bits);  // its low bits are those of an integer
  const T k = bit_cast<T>(Bits((bits >> F::mantissa_bits) | bit_cast<Bits>(integer))) - (integer + T(F::bias)) -
              (subnormal ? T(F::mantissa_bits + 1) : T(0));
  const T f = m - T(1);
  const T s = f / (T(2) + f);
  const T z = s * s;
  T R;
  if constexpr (is_float<T>) {
    R = z * polynomial(z, 0.666666865f, 0.399887711f, 0.295803994f);
  } else {
    R = z * polynomial(z, 0.66666666666666696, 0.39999999999899238, 0.28571428626095891, 0.22222211115144161,
                       0.18182890556695602, 0.15331674030167861, 0.1461703754879165);
  }
  const T half_square = T(0.5) * f * f;
  return k * F::ln2_hi - ((half_square - (s * (half_square + R) + (k * F::ln2_lo + correction))) - f);
}

// The logarithm of u where it is not that of a positive finite number.
template <class T>
GDBP_HD T log_or_edge(T u, T finite) {
  const T edge = u == T(0) ? -Format<T>::infinity : not_a_number<T>;
  return u > T(0) ? (u < Format<T>::infinity ? finite : u) : edge;
}

template <class T>
GDBP_HD T log(T x) {
  return log_or_edge(x, log_of_sum(x, T(-0.0)));
}

// log(u + c), where c is what 1 + x lost by rounding to u.
template <class T>
GDBP_HD T log1p(T x) {
  const T u = T(1) + x;
  const T c = x > T(1) ? T(1) - (u - x) : x - (u - T(1));
  return abs(x) < half_epsilon<T> ? x : log_or_edge(u, log_of_sum(u, c / u));
}

// log(1 + e) for 0 <= e <= 1, where 1 / (1 + e) is known.
template <class T>
GDBP_HD T log1p_of_fraction(T e, T inverse) {
  const T u = T(1) + e;
  const T finite = log_of_sum(u, (e - (u - T(1))) * inverse);
  return e == e ? finite : e;
}

// 1 / (1 + e) for 0 <= e <= 1; what 1 + e loses by rounding is put back.
template <class T>
GDBP_HD T inverse_of_one_plus(T e) {
  const T sum = T(1) + e, lost = e - (sum - T(1)), y = T(1) / sum;
  return y - y * (lost * y);
}

// 1 / (1 + exp(-x)), from e = exp(-|x|): an exponential never above 1. What 1 + e loses by rounding is put
// back, its quotient by 1 + e being wanted to a digit or so: hence 1 - e / 2.
template <class T>
GDBP_HD T logistic(T e, bool negative) {
  const T sum = T(1) + e;
  const T lost = e - (sum - T(1));
  const T y = (negative ? e : T(1)) / sum;
  return y - y * (lost * (T(1) - T(0.5) * e));
}
template <class T>
GDBP_HD T sigmoid(T x) {
  return logistic(exp_of_nonpositive(-abs(x)), x < T(0));
}

// A polynomial around 0, 1 - 2 / (exp(2x) + 1) from where that no longer cancels.
template <class T>
GDBP_HD T tanh(T x) {
  const T a = at_most(abs(x), T(20));
  const T z = a * a;
  T p;
  if constexpr (is_float<T>) {
    p = polynomial(z, -0.333333343f, 0.133333042f, -0.0539592542f, 0.021768868f, -0.00834378041f, 0.00229255762f);
  } else {
    p = polynomial(z, -0.33333333333333331, 0.13333333333333042, -0.053968253967896361, 0.02186948851898143,
                   -0.0088632351026534835, 0.0035921217436959856, -0.0014557753532096296, 0.00058966036065526714,
                   -0.00023758968852117011, 9.256923588512033e-05, -3.1198926667734871e-05, 6.4841049824054789e-06);
  }
  const Exponential<T> e = exp_of_sum(T(2) * a, T(-0.0));
  const T far = T(1) - T(2) / (power_of_two(e.exponent) * (T(1) + e.excess) + T(1));
  return copysign(a < T(0.625) ? a + a * (z * p) : far, x);
}

}  // namespace gdbp::math

#include "common/math_normal.h"
