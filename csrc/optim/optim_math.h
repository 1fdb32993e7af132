// Update rules: one struct each, the arithmetic of one element. The compute type T is float, or double
// for float64 parameters. A rule is built on the host, in double, from the list of hyper-parameters and the
// clock of one parameter, and is then applied to every element of it.
//
// Formulas and order of operations are those of torch.optim's for-loop implementations.
#pragma once
#include <cmath>

#include "optim/hyper.h"

namespace gdbp::optim {

// As torch's lerp, from the nearer end, where the error vanishes.
template <class T>
GDBP_HD T lerp(T from, T to, T weight) {
  const bool near = weight < T(0.5);
  return (near ? from : to) + (near ? weight : weight - T(1)) * (to - from);
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
  Sgd(const Hyper& h, const Clock&) : lr(T(h.lr)) {}
  GDBP_HD void operator()(T& p, T g, T*) const { p -= lr * g; }
};

// SGD with momentum (Sutskever et al., 2013, in torch's form). hyper: momentum, dampening; states:
// momentum_buffer. The first gradient enters the buffer undamped; the clock counts for that alone.
template <class T, bool nesterov>
struct Momentum {
  static constexpr int states = 1;
  T lr, momentum, gain, lookahead;
  Momentum(const Hyper& h, const Clock& clock)
      : lr(T(h.lr)),
        momentum(T(clock.step > 1 ? h.rule[0] : 0)),
        gain(T(clock.step > 1 ? 1 - h.rule[1] : 1)),
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
  RmsProp(const Hyper& h, const Clock&)
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
  Adam(const Hyper& h, const Clock& clock)
      : step_size(T(h.lr / (1 - std::pow(h.rule[0], clock.step)))),
        beta2(T(h.rule[1])),
        eps(T(h.rule[2])),
        root_correction(T(1 / std::sqrt(1 - std::pow(h.rule[1], clock.step)))),
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

// Adagrad (Duchi et al., 2011). hyper: lr_decay, eps; states: sum.
template <class T>
struct Adagrad {
  static constexpr int states = 1;
  T lr, eps;
  Adagrad(const Hyper& h, const Clock& clock) : lr(T(h.lr / (1 + (clock.step - 1) * h.rule[0]))), eps(T(h.rule[1])) {}
  GDBP_HD void operator()(T& p, T g, T* s) const {
    s[0] += g * g;
    p -= lr * g / (math::sqrt(s[0]) + eps);
  }
};

// Adadelta (Zeiler, 2012). hyper: rho, eps; states: square_avg, acc_delta.
template <class T>
struct Adadelta {
  static constexpr int states = 2;
  T lr, rho, weight, eps;
  Adadelta(const Hyper& h, const Clock&)
      : lr(T(h.lr)), rho(T(h.rule[0])), weight(T(1 - h.rule[0])), eps(T(h.rule[1])) {}
  GDBP_HD void operator()(T& p, T g, T* s) const {
    s[0] = rho * s[0] + weight * g * g;
    const T delta = math::sqrt(s[1] + eps) / math::sqrt(s[0] + eps) * g;
    s[1] = rho * s[1] + weight * delta * delta;
    p -= lr * delta;
  }
};

// Adamax (Kingma and Ba, 2015, section 7). hyper: beta1, beta2, eps; states: exp_avg, exp_inf.
template <class T>
struct Adamax {
  static constexpr int states = 2;
  T step_size, beta2, eps, weight1;
  Adamax(const Hyper& h, const Clock& clock)
      : step_size(T(h.lr / (1 - std::pow(h.rule[0], clock.step)))),
        beta2(T(h.rule[1])),
        eps(T(h.rule[2])),
        weight1(T(1 - h.rule[0])) {}
  GDBP_HD void operator()(T& p, T g, T* s) const {
    s[0] = lerp(s[0], g, weight1);
    s[1] = maximum(beta2 * s[1], math::abs(g) + eps);
    p -= step_size * s[0] / s[1];
  }
};

// NAdam (Dozat, 2016). hyper: beta1, beta2, eps, momentum_decay; states: exp_avg, exp_avg_sq.
template <class T>
struct NAdam {
  static constexpr int states = 2;
  T gradient_size, mean_size, beta2, eps, root_correction, weight1, weight2;
  // The momentum of one step; the clock's product is over all steps so far.
  static double momentum(const Hyper& h, double step) {
    return h.rule[0] * (1 - 0.5 * std::pow(0.96, step * h.rule[3]));
  }
  NAdam(const Hyper& h, const Clock& clock)
      : gradient_size(T(h.lr * (1 - momentum(h, clock.step)) / (1 - clock.product))),
        mean_size(T(h.lr * momentum(h, clock.step + 1) / (1 - clock.product * momentum(h, clock.step + 1)))),
        beta2(T(h.rule[1])),
        eps(T(h.rule[2])),
        root_correction(T(1 / std::sqrt(1 - std::pow(h.rule[1], clock.step)))),
        weight1(T(1 - h.rule[0])),
        weight2(T(1 - h.rule[1])) {}
  GDBP_HD void operator()(T& p, T g, T* s) const {
    s[0] = lerp(s[0], g, weight1);
    s[1] = beta2 * s[1] + weight2 * g * g;
    p -= (gradient_size * g + mean_size * s[0]) / (math::sqrt(s[1]) * root_correction + eps);
  }
};

// RAdam (Liu et al., 2020): Adam once its variance is worth trusting, momentum before.
// hyper: beta1, beta2, eps; states: exp_avg, exp_avg_sq.
template <class T>
struct RAdam {
  static constexpr int states = 2;
  T step_size, rectified, beta2, eps, weight1, weight2;
  RAdam(const Hyper& h, const Clock& clock)
      : beta2(T(h.rule[1])), eps(T(h.rule[2])), weight1(T(1 - h.rule[0])), weight2(T(1 - h.rule[1])) {
    const double correction2 = 1 - std::pow(h.rule[1], clock.step);
    const double limit = 2 / (1 - h.rule[1]) - 1;
    const double length = limit - 2 * clock.step * (1 - correction2) / correction2;
    const double rectification =
        std::sqrt((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length) * correction2);
    rectified = length > 5 ? 1 : 0;
    step_size = T(h.lr / (1 - std::pow(h.rule[0], clock.step)) * (length > 5 ? rectification : 1));
  }
  GDBP_HD void operator()(T& p, T g, T* s) const {
    s[0] = lerp(s[0], g, weight1);
    s[1] = beta2 * s[1] + weight2 * g * g;
    p -= step_size * s[0] / (rectified != 0 ? math::sqrt(s[1]) + eps : T(1));
  }
};

// Lion (Chen et al., 2023): the sign of a mixture of momentum and gradient. hyper: beta1, beta2;
// states: exp_avg.
template <class T>
struct Lion {
  static constexpr int states = 1;
  T lr, beta1, beta2, weight1, weight2;
  Lion(const Hyper& h, const Clock&)
      : lr(T(h.lr)), beta1(T(h.rule[0])), beta2(T(h.rule[1])), weight1(T(1 - h.rule[0])), weight2(T(1 - h.rule[1])) {}
  GDBP_HD void operator()(T& p, T g, T* s) const {
    const T mixture = beta1 * s[0] + weight1 * g;
    // 0 for 0, NaN for NaN.
    p -= lr * (mixture > 0 ? T(1) : mixture < 0 ? T(-1) : mixture);
    s[0] = beta2 * s[0] + weight2 * g;
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
#define GDBP_OPTIM_RULES(ROW)                               \
  ROW("sgd", Sgd)                                           \
  ROW("sgd_momentum", SgdMomentum)                          \
  ROW("sgd_nesterov", SgdNesterov)                          \
  ROW("rmsprop", RmsPropPlain)                              \
  ROW("rmsprop_momentum", RmsPropMomentum)                  \
  ROW("rmsprop_centered", RmsPropCentered)                  \
  ROW("rmsprop_centered_momentum", RmsPropCenteredMomentum) \
  ROW("adam", AdamPlain)                                    \
  ROW("adam_amsgrad", AdamAmsgrad)                          \
  ROW("adagrad", Adagrad)                                   \
  ROW("adadelta", Adadelta)                                 \
  ROW("adamax", Adamax)                                     \
  ROW("nadam", NAdam)                                       \
  ROW("radam", RAdam)                                       \
  ROW("lion", Lion)

}  // namespace gdbp::optim
