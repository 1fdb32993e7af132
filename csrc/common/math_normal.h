// The normal distribution and the error function, for float and double; included by common/math.h.
#pragma once
#include "common/math.h"

namespace gdbp::math {

// exp(-x^2 / 2) for |x| <= normal_max. Squaring would round, and the exponential would magnify that by
// x^2 / 2; so x is split, and the square of its upper half is exact.
template <class T>
GDBP_HD Exponential<T> gaussian(T x) {
  const T upper = upper_half(x);
  return exp_of_sum(T(-0.5) * upper * upper, T(-0.5) * (x - upper) * (x + upper));
}

// 1 - Phi(a) for a >= 0, with a small relative error: exp(-a^2 / 2) P(t) / (a + 4), t = (a - 4) / (a + 4).
// The form is that of Shepherd and Laframboise, Mathematics of Computation 36, 1981, for
// (1 + 2x) exp(x^2) erfc(x); with 1 / (a + 4) as the factor, one division serves both.
template <class T>
GDBP_HD T normal_upper_tail(T a) {
  const T x = at_most(a, Format<T>::normal_max);
  const T w = T(1) / (x + T(4));
  const T t = T(2) * (x * w) - T(1);  // (x - 4) * w would round more often where P is steep
  T p;
  if constexpr (is_float<T>) {
    p = polynomial(t, 0.755285144f, -0.607896686f, 0.387137264f, -0.186521187f, 0.0603973977f, -0.00754523976f,
                   -0.0034875581f, 0.00164669135f, 0.000168614511f, -0.000235790169f, -5.30895304e-05f);
  } else {
    p = polynomial(t, 0.75528513041575152, -0.60789664197189208, 0.38713740074221453, -0.18652185795965717,
                   0.060396574890936083, -0.0075401889667294063, -0.0034796923673851912, 0.0016308184576315405,
                   0.00013334431234060081, -0.00023109493555078102, -1.9082582127215188e-06, 3.5144688064914643e-05,
                   7.1666608147468695e-07, -5.9201798546556548e-06, -6.29698419169375e-07, 1.0215670487240311e-06,
                   2.7181238940500646e-07, -1.5497993604244351e-07, -8.5422206441667584e-08, 1.3289007028680458e-08,
                   1.963146509980107e-08, 1.9181639992074244e-09, -2.5261891551101453e-09, -7.2753001071716054e-10);
  }
  return gaussian(x).times_below_one(p * w);
}

// Phi(x), the standard normal distribution function
template <class T>
GDBP_HD T normal_cdf(T x) {
  const T tail = normal_upper_tail(abs(x));
  return x < T(0) ? tail : T(1) - tail;
}

// Its density, exp(-x^2 / 2) / sqrt(2 pi)
template <class T>
GDBP_HD T normal_pdf(T x) {
  return gaussian(at_most(abs(x), Format<T>::normal_max)).times_below_one(T(0.3989422804014327));
}

// A polynomial around 0; from 1 on the tail is small enough for its error not to matter.
template <class T>
GDBP_HD T erf(T x) {
  const T a = abs(x);
  const T z = a * a;
  T p;  // erf(a) / a - 1
  if constexpr (is_float<T>) {
    p = polynomial(z, 0.128379166f, -0.37612626f, 0.112835944f, -0.0268542115f, 0.00518908724f, -0.00080168643f,
                   7.87587487e-05f);
  } else {
    p = polynomial(z, 0.12837916709551256, -0.37612638903183543, 0.11283791670945006, -0.02686617064323777,
                   0.0052239776071164225, -0.00085483259753896918, 0.00012055294904839707, -1.4924736907419661e-05,
                   1.6447424703317362e-06, -1.6208483801871705e-07, 1.3720064546777686e-08, -7.7958988270021425e-10);
  }
  const T far = T(1) - T(2) * normal_upper_tail(a * T(1.4142135623730951));
  return copysign(a < T(1) ? a + a * p : far, x);
}

}  // namespace gdbp::math
