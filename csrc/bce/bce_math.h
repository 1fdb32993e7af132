// Binary cross-entropy of a logit x with a target t of 0 to 1, positives weighted by q:
//   loss = q t softplus(-x) + (1 - t) softplus(x)
// Two terms of one sign: the usual x - x t + softplus(-x) leaves nothing of the loss of confident negatives.
#pragma once
#include "common/math.h"

namespace gdbp::bce {

// A logit, and what value and slopes have in common; a loop over several forms it once.
template <class C>
struct Logit {
  C x, e, inverse;  // x, exp(-|x|), 1 / (1 + e)
  GDBP_HD explicit Logit(C x)
      : x(x), e(math::exp_of_nonpositive(-math::abs(x))), inverse(math::inverse_of_one_plus(e)) {}
};

// softplus(-x) and softplus(x), the logarithms of 1 / sigmoid(x) and 1 / sigmoid(-x).
template <class C>
struct Softplus {
  C minus, plus;
  GDBP_HD explicit Softplus(const Logit<C>& at) {
    const C tail = math::log1p_of_fraction(at.e, at.inverse);
    minus = math::at_least(-at.x, C(0)) + tail;
    plus = math::at_least(at.x, C(0)) + tail;
  }
};

template <class C>
GDBP_HD C loss(const Logit<C>& at, C t, C q) {
  const Softplus<C> softplus(at);
  return q * t * softplus.minus + (C(1) - t) * softplus.plus;
}

template <class C>
GDBP_HD C input_slope(const Logit<C>& at, C t, C q) {
  return ((C(1) - t) * (at.x < C(0) ? at.e : C(1)) - q * t * (at.x > C(0) ? at.e : C(1))) * at.inverse;
}

// q softplus(-x) - softplus(x), the common part of both taken out; at -infinity there would be nothing left
template <class C>
GDBP_HD C target_slope(const Logit<C>& at, C q) {
  const C slope = (q - C(1)) * Softplus<C>(at).minus - at.x;
  return at.x == -math::Format<C>::infinity ? -q * at.x : slope;
}

}  // namespace gdbp::bce
