// Update rules: one struct each, the arithmetic of one element. The compute type T is float, or double
// for float64 parameters. A rule is built on the host, in double, from the list of hyper-parameters and the
// number of the step (1 for the first), and is then applied to every element of one tensor.
//
// Formulas and order of operations are those of torch.optim's for-loop implementations.
#pragma once
#include <cmath>

#include "common/macros.h"
#include "common/math.h"

namespace gdbp::optim {

constexpr int kMaxStates = 4;

// Hyper-parameters in the order in which Python sends them: those that every rule shares, then its own.
struct Hyper {
  double lr;
  double weight_decay;  // L2: added to the gradient, or with `decoupled` taken off the parameter
  double decoupled;     // 0 or 1
  double maximize;      // 0 or 1
  double l1;
  double l1_prox;     // 0: subgradient added to the gradient; 1: soft threshold after the update
  double clip_value;  // element-wise; infinity for none
  double grad_scale;  // multiplies every gradient first; 1 for none
  double rule[8];
};
constexpr int kSharedHyper = 8;

// What happens around a rule, in torch's order: scale, clip, maximize, L1 and L2, decoupled decay, the
// rule, the soft threshold. Every comparison lets NaN pass, so that a broken gradient stays visible.
template <class T>
struct Surroundings {
  T scale, clip, l1, l2, keep, threshold;

  explicit Surroundings(const Hyper& h)
      : scale(T(h.maximize != 0 ? -h.grad_scale : h.grad_scale)),
        clip(T(h.clip_value)),
        l1(T(h.l1_prox != 0 ? 0 : h.l1)),
        l2(T(h.decoupled != 0 ? 0 : h.weight_decay)),
        keep(T(h.decoupled != 0 ? 1 - h.lr * h.weight_decay : 1)),
        threshold(T(h.l1_prox != 0 ? h.lr * h.l1 : 0)) {}

  GDBP_HD T gradient(T g, T p) const {
    g *= scale;
    g = g > clip ? clip : g < -clip ? -clip : g;
    g = l1 != 0 ? g + l1 * T((p > 0) - (p < 0)) : g;
    return l2 != 0 ? g + l2 * p : g;
  }
  GDBP_HD T shrink(T p) const {
    const T magnitude = math::abs(p) - threshold;
    const T shrunk = math::copysign(magnitude < 0 ? T(0) : magnitude, p);
    return threshold > 0 ? shrunk : p;
  }
};

// torch's lerp picks the form whose error vanishes at the nearer end.
template <class T>
GDBP_HD T lerp(T from, T to, T weight) {
  return weight < T(0.5) ? from + weight * (to - from) : to - (to - from) * (T(1) - weight);
}

// torch's maximum: NaN wins.
template <class T>
GDBP_HD T maximum(T a, T b) {
  return a > b || a != a ? a : b;
}

// Stochastic gradient descent. hyper: -; states: -.
template <class T>
struct Sgd {
  static constexpr int states = 0;
  T lr;
  Sgd(const Hyper& h, double) : lr(T(h.lr)) {}
  GDBP_HD void operator()(T& p, T g, T*) const { p -= lr * g; }
};

// SGD with momentum (Sutskever et al., 2013, in torch's form). hyper: momentum, dampening; states:
// momentum_buffer. The first gradient enters the buffer undamped; `step` counts for that alone.
template <class T, bool nesterov>
struct Momentum {
  static constexpr int states = 1;
  T lr, momentum, gain, lookahead;
  Momentum(const Hyper& h, double step)
      : lr(T(h.lr)),
        momentum(T(step > 1 ? h.rule[0] : 0)),
        gain(T(step > 1 ? 1 - h.rule[1] : 1)),
        lookahead(T(h.rule[0])) {}
  GDBP_HD void operator()(T& p, T g, T* s) const {
    s[0] = momentum * s[0] + gain * g;
    p -= lr * (nesterov ? g + lookahead * s[0] : s[0]);
  }
};

// RMSprop (Hinton, 2012; centered: Graves, 2013). hyper: alpha, eps, momentum; states: square_avg,
// then momentum_buffer where there is momentum, then grad_avg where centered. The centered variance is
// clamped at 0, where rounding would make torch take the root of a negative number.
template <class T, bool centered, bool with_momentum>
struct RmsProp {
  static constexpr int states = 1 + centered + with_momentum;
  T lr, alpha, weight, eps, momentum;
  RmsProp(const Hyper& h, double)
      : lr(T(h.lr)), alpha(T(h.rule[0])), weight(T(1 - h.rule[0])), eps(T(h.rule[1])), momentum(T(h.rule[2])) {}
  GDBP_HD void operator()(T& p, T g, T* s) const {
    s[0] = alpha * s[0] + weight * g * g;
    T variance = s[0];
    if constexpr (centered) {
      T& mean = s[1 + with_momentum];
      mean = lerp(mean, g, weight);
      variance -= mean * mean;
      variance = variance < 0 ? T(0) : variance;
    }
    const T update = g / (math::sqrt(variance) + eps);
    if constexpr (with_momentum) {
      s[1] = momentum * s[1] + update;
      p -= lr * s[1];
    } else {
      p -= lr * update;
    }
  }
};

// Adam (Kingma and Ba, 2015) and, with decoupled decay, AdamW (Loshchilov and Hutter, 2019).
// hyper: beta1, beta2, eps; states: exp_avg, exp_avg_sq, then max_exp_avg_sq for amsgrad.
template <class T, bool amsgrad>
struct Adam {
  static constexpr int states = 2 + amsgrad;
  T step_size, beta2, eps, root_correction, weight1, weight2;
  Adam(const Hyper& h, double step)
      : step_size(T(h.lr / (1 - std::pow(h.rule[0], step)))),
        beta2(T(h.rule[1])),
        eps(T(h.rule[2])),
        root_correction(T(1 / std::sqrt(1 - std::pow(h.rule[1], step)))),
        weight1(T(1 - h.rule[0])),
        weight2(T(1 - h.rule[1])) {}
  GDBP_HD void operator()(T& p, T g, T* s) const {
    s[0] = lerp(s[0], g, weight1);
    s[1] = beta2 * s[1] + weight2 * g * g;
    T variance = s[1];
    if constexpr (amsgrad) variance = s[2] = maximum(s[2], s[1]);
    p -= step_size * s[0] / (math::sqrt(variance) * root_correction + eps);
  }
};

// Names for the variants, so that a row of the table needs no commas.
template <class T> using SgdMomentum = Momentum<T, false>;
template <class T> using SgdNesterov = Momentum<T, true>;
template <class T> using RmsPropPlain = RmsProp<T, false, false>;
template <class T> using RmsPropMomentum = RmsProp<T, false, true>;
template <class T> using RmsPropCentered = RmsProp<T, true, false>;
template <class T> using RmsPropCenteredMomentum = RmsProp<T, true, true>;
template <class T> using AdamPlain = Adam<T, false>;
template <class T> using AdamAmsgrad = Adam<T, true>;

// The table: each rule's name as Python says it, and its template. A new rule is a struct and a row.
#define GDBP_OPTIM_RULES(ROW)                              \
  ROW("sgd", Sgd)                                          \
  ROW("sgd_momentum", SgdMomentum)                         \
  ROW("sgd_nesterov", SgdNesterov)                         \
  ROW("rmsprop", RmsPropPlain)                             \
  ROW("rmsprop_momentum", RmsPropMomentum)                 \
  ROW("rmsprop_centered", RmsPropCentered)                 \
  ROW("rmsprop_centered_momentum", RmsPropCenteredMomentum) \
  ROW("adam", AdamPlain)                                   \
  ROW("adam_amsgrad", AdamAmsgrad)

}  // namespace gdbp::optim
