// What an update rule is built from, and what happens around every rule.
#pragma once
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

// Numbers that a parameter carries from step to step, after this step's tick.
struct Clock {
  double step;     // 1 for the first update
  double product;  // of NAdam's momentum schedule; 1 for every other rule
};

// What happens around a rule, in torch's order: scale, clip, maximize, L1 and L2, decoupled decay, the
// rule, the soft threshold. Every comparison lets NaN pass, so that a broken gradient stays visible.
template <class T>
struct Surroundings {
  T scale, clip, l1, l2, keep, threshold;

  explicit Surroundings(const Hyper& h, double coefficient = 1)
      // Each factor is rounded, as on CUDA, where the host does not know the coefficient.
      : scale(T(h.maximize != 0 ? -h.grad_scale : h.grad_scale) * T(coefficient)),
        clip(T(h.clip_value)),
        l1(T(h.l1_prox != 0 ? 0 : h.l1)),
        l2(T(h.decoupled != 0 ? 0 : h.weight_decay)),
        keep(T(h.decoupled != 0 ? 1 - h.lr * h.weight_decay : 1)),
        threshold(T(h.l1_prox != 0 ? h.lr * h.l1 : 0)) {}

  // Whether nothing is clipped and there is no L1, as in most training: what they cost an element on a CPU, switched
  // off or not, is as much as the rest of Adam.
  bool plain() const { return clip == math::Format<T>::infinity && l1 == 0 && threshold == 0; }

  template <bool plain = false>
  GDBP_HD T gradient(T g, T p) const {
    g *= scale;
    if constexpr (!plain) {
      g = g > clip ? clip : g < -clip ? -clip : g;
      g = l1 != 0 ? g + l1 * T((p > 0) - (p < 0)) : g;
    }
    return l2 != 0 ? g + l2 * p : g;
  }
  template <bool plain = false>
  GDBP_HD T shrink(T p) const {
    if constexpr (plain) return p;
    const T magnitude = math::abs(p) - threshold;
    const T shrunk = math::copysign(magnitude < 0 ? T(0) : magnitude, p);
    return threshold > 0 ? shrunk : p;
  }
};

}  // namespace gdbp::optim
