// Activations: one struct each. forward(z) gives the output; backward(g, s) gives the gradient of the
// pre-activation from the gradient of the output and the saved tensor that `saves` names.
#pragma once
#include "common/math.h"

namespace gdbp::linear {

enum class Activation : int { none, relu, gelu, sigmoid, tanh };
constexpr const char* kActivationNames[] = {"none", "relu", "gelu", "sigmoid", "tanh"};

// What the backward pass needs: the output where the derivative is a function of it (one tensor less
// to keep), the pre-activation where it is not.
enum class Saved : int { nothing, output, pre };

struct None {
  static constexpr Saved saves = Saved::nothing;
  template <class T>
  static GDBP_HD T forward(T z) {
    return z;
  }
  template <class T>
  static GDBP_HD T backward(T g, T) {
    return g;
  }
};

// Comparisons are written so that NaN survives in both directions, as in torch.
struct Relu {
  static constexpr Saved saves = Saved::output;
  template <class T>
  static GDBP_HD T forward(T z) {
    return z <= T(0) ? T(0) : z;
  }
  template <class T>
  static GDBP_HD T backward(T g, T y) {
    return y <= T(0) ? T(0) : g;
  }
};

// Gaussian error linear unit, exact form: z * Phi(z) (Hendrycks and Gimpel, 2016).
struct Gelu {
  static constexpr Saved saves = Saved::pre;
  template <class T>
  static GDBP_HD T forward(T z) {
    return z * math::normal_cdf(z);
  }
  template <class T>
  static GDBP_HD T backward(T g, T z) {
    return g * (math::normal_cdf(z) + z * math::normal_pdf(z));
  }
};

struct Sigmoid {
  static constexpr Saved saves = Saved::output;
  template <class T>
  static GDBP_HD T forward(T z) {
    return math::sigmoid(z);
  }
  template <class T>
  static GDBP_HD T backward(T g, T y) {
    return g * (T(1) - y) * y;
  }
};

struct Tanh {
  static constexpr Saved saves = Saved::output;
  template <class T>
  static GDBP_HD T forward(T z) {
    return math::tanh(z);
  }
  template <class T>
  static GDBP_HD T backward(T g, T y) {
    return g * (T(1) - y * y);
  }
};

// Calls f(Op{}) with the activation's struct.
template <class F>
auto dispatch(Activation activation, F&& f) {
  switch (activation) {
    case Activation::relu: return f(Relu{});
    case Activation::gelu: return f(Gelu{});
    case Activation::sigmoid: return f(Sigmoid{});
    case Activation::tanh: return f(Tanh{});
    default: return f(None{});
  }
}

inline Saved saves(Activation activation) {
  return dispatch(activation, [](auto op) { return decltype(op)::saves; });
}

}  // namespace gdbp::linear
