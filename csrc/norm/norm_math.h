// Batch normalisation of one channel (Ioffe and Szegedy, 2015): its statistics, what they make of an element,
// and the gradients. Statistics are kept in double: there are few of them, and every element meets them.
#pragma once
#include "common/activations.h"

namespace gdbp::norm {

// Count, mean, and sum of squared deviations of a set of numbers.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // From the sums of (x - pivot) and (x - pivot)^2. With a pivot out of the set itself the difference loses no
  // more than a factor of `count`, wherever the mean lies.
  static GDBP_HD Moments about(double pivot, double count, double sum, double sum_of_squares) {
    const double shift = sum / count;
    return {count, pivot + shift, math::at_least(sum_of_squares - sum * shift, 0.0)};
  }
};

// Of the union of two sets, not both empty (Chan, Golub and LeVeque, 1983).
GDBP_HD Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count, share = b.count / count, distance = b.mean - a.mean;
  const double squares = a.squares + b.squares + distance * distance * (a.count * share);
  // An empty set says nothing, whatever its mean.
  return b.count == 0 ? a : a.count == 0 ? b : Moments{count, a.mean + distance * share, squares};
}

GDBP_HD double inverse_deviation(double variance, double eps) { return 1 / math::sqrt(variance + eps); }

// What the elements of a channel need: z = (x - center) * scale + shift. `shift` makes up for what the mean lost
// when it was rounded to `center`, so a mean far from 0 costs no digits.
template <class C>
struct Normalize {
  C center, scale, shift;

  static GDBP_HD Normalize of(double mean, double variance, double eps, double weight, double bias) {
    const C center = C(mean);
    const double scale = weight * inverse_deviation(variance, eps);
    return {center, C(scale), C(bias - (mean - double(center)) * scale)};
  }
  GDBP_HD C operator()(C x) const { return (x - center) * scale + shift; }
};

// A channel's gradients, from the sums of g and of g * (x - center), where g is the gradient of z: those of weight
// and bias, and of the elements, grad_x = scale * g + slope * (x - center) + offset. slope and offset are what
// flows through the batch's mean and variance: 0 where the statistics are not the batch's.
template <class C>
struct Gradients {
  C weight, bias, slope, offset;

  static GDBP_HD Gradients of(double mean, double variance, double eps, double weight, double count, double sum_g,
                              double sum_g_x, bool of_batch) {
    const double lost = mean - double(C(mean));
    const double inverse = inverse_deviation(variance, eps);
    const double grad_weight = (sum_g_x - lost * sum_g) * inverse;
    const double slope = of_batch ? -weight * inverse * inverse * grad_weight / count : 0.0;
    const double offset = of_batch ? -lost * slope - weight * inverse * sum_g / count : 0.0;
    return {C(grad_weight), C(sum_g), C(slope), C(offset)};
  }
};

// A slope of 0 leaves infinite elements out: with fixed statistics their gradient is finite.
template <class C>
GDBP_HD C input_gradient(C g, C x, C center, C scale, C slope, C offset) {
  const C through_statistics = slope == C(0) ? offset : slope * (x - center) + offset;
  return scale * g + through_statistics;
}

GDBP_HD double moving_average(double old, double batch, double momentum) {
  return (1 - momentum) * old + momentum * batch;
}

}  // namespace gdbp::norm
