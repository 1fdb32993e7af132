// Binary cross-entropy of a logit x with a target t of 0 to 1, positives weighted by q:
//   loss = q t softplus(-x) + (1 - t) softplus(x)
// Two terms of one sign: the usual x - x t + softplus(-x) leaves nothing of the loss of confident negatives.
#pragma once
#include "common/math.h"

namespace gdbp::bce {

// softplus(-x) and softplus(x), the logarithms of 1 / sigmoid(x) and 1 / sigmoid(-x).
template <class C>
struct Softplus {
  C minus, plus;
  GDBP_HD explicit Softplus(C x) {
    const C tail = math::log1p(math::exp(-math::abs(x)));
    minus = math::at_least(-x, C(0)) + tail;
    plus = math::at_least(x, C(0)) + tail;
  }
};

template <class C>
GDBP_HD C loss(C x, C t, C q) {
  const Softplus<C> softplus(x);
  return q * t * softplus.minus + (C(1) - t) * softplus.plus;
}

template <class C>
GDBP_HD C input_slope(C x, C t, C q) {
  const C e = math::exp(-math::abs(x));
  return (C(1) - t) * math::logistic(e, x < C(0)) - q * t * math::logistic(e, x > C(0));
}

// q softplus(-x) - softplus(x), the common part of both taken out; at -infinity there would be nothing left
template <class C>
GDBP_HD C target_slope(C x, C, C q) {
  const C slope = (q - C(1)) * Softplus<C>(x).minus - x;
  return x == -math::Format<C>::infinity ? -q * x : slope;
}

}  // namespace gdbp::bce
