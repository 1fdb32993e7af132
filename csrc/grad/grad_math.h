// What is summed over gradients, and what the sum decides.
#pragma once
#include <cmath>

#include "common/dtype.h"
#include "grad/grad.h"

namespace gdbp::grad {

constexpr double kLargest = 1.7976931348623157e308;

// A norm's terms and how they are put together, both in double: in float, and more so in half types, powers
// overflow or vanish long before the norm itself does.
struct Square {
  GDBP_HD double term(double x) const { return x * x; }
  GDBP_HD double operator()(double a, double b) const { return a + b; }
};
struct Absolute {
  GDBP_HD double term(double x) const { return fabs(x); }
  GDBP_HD double operator()(double a, double b) const { return a + b; }
};
struct Power {
  double order;
  GDBP_HD double term(double x) const { return pow(fabs(x), order); }
  GDBP_HD double operator()(double a, double b) const { return a + b; }
};
// The larger; NaN stays.
struct Largest {
  GDBP_HD double term(double x) const { return fabs(x); }
  GDBP_HD double operator()(double a, double b) const { return a > b || a != a ? a : b; }
};

// The terms of a Penalty.
struct Penalties {
  double l1, half_l2;
  explicit Penalties(const Penalty& p) : l1(p.l1), half_l2(p.l2 / 2) {}
  GDBP_HD double term(double x) const { return l1 * fabs(x) + half_l2 * (x * x); }
  GDBP_HD double operator()(double a, double b) const { return a + b; }
};
// The derivative. Of |x| it is 0 at 0; NaN stays.
template <class C>
GDBP_HD C penalty_slope(C x, C l1, C l2) {
  return (x > C(0) ? l1 : x < C(0) ? -l1 : C(0)) + l2 * x;
}

// Calls f with the terms of the norm of this order.
template <class F>
auto dispatch_order(double order, F&& f) {
  if (order == 2) return f(Square{});
  if (order == 1) return f(Absolute{});
  if (order > kLargest) return f(Largest{});
  return f(Power{order});
}

GDBP_HD double root(double total, double order) {
  if (order == 2) return sqrt(total);
  return order == 1 || order > kLargest ? total : pow(total, 1 / order);
}

// torch's clip_grad_norm_: max_norm / (total + 1e-6), never above 1. NaN and infinity pass, unless they are
// to stop the step.
GDBP_HD Norm decide(double total_of_terms, const Limit& limit) {
  Norm norm;
  norm.total = root(total_of_terms, limit.order) * limit.scale;
  const double ratio = limit.max_norm / (norm.total + 1e-6);
  // Without a limit there is no ratio: of two infinities it would be NaN.
  norm.coefficient = limit.max_norm > kLargest || ratio > 1 ? limit.scale : limit.scale * ratio;
  norm.skip = limit.skip_nonfinite != 0 && !(norm.total <= kLargest) ? 1 : 0;
  return norm;
}

// While it is summed, Health holds the sum of squares for the norm and the sum for the mean.
GDBP_HD void add(Health& to, double x) {
  const double size = fabs(x);
  to.norm += x * x;
  to.largest = size > to.largest ? size : to.largest;
  to.mean += x;
  to.nans += x != x;
  to.infinities += size > kLargest;
  to.zeros += x == 0;
}
GDBP_HD void add(Health& to, const Health& other) {
  to.norm += other.norm;
  to.largest = other.largest > to.largest ? other.largest : to.largest;
  to.mean += other.mean;
  to.nans += other.nans;
  to.infinities += other.infinities;
  to.zeros += other.zeros;
}
GDBP_HD Health finish(Health sums, int64_t numel) {
  sums.norm = sqrt(sums.norm);
  sums.mean /= double(numel > 0 ? numel : 1);
  return sums;
}

// Written so that NaN stays.
template <class T>
GDBP_HD T clamp(T x, T limit) {
  return x > limit ? limit : x < -limit ? -limit : x;
}

}  // namespace gdbp::grad
