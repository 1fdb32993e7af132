// Activations: one struct each. forward(z) gives the output; backward(g, s) gives the gradient of the
// pre-activation from the gradient of the output and the saved tensor that `saves` names.
#pragma once
#include "common/math.h"

namespace gdbp {

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

// negative_slope 0.01, torch's default.
struct LeakyRelu {
  static constexpr Saved saves = Saved::output;
  template <class T>
  static GDBP_HD T forward(T z) {
    return z > T(0) ? z : T(0.01) * z;
  }
  template <class T>
  static GDBP_HD T backward(T g, T y) {
    return y > T(0) ? g : T(0.01) * g;
  }
};

// Exponential linear unit (Clevert et al., 2016), alpha 1. Its derivative below 0 is y + 1, but of a rounded y that is
// near to -1 not a digit of it is left.
struct Elu {
  static constexpr Saved saves = Saved::pre;
  template <class T>
  static GDBP_HD T forward(T z) {
    return z <= T(0) ? math::expm1(z) : z;
  }
  template <class T>
  static GDBP_HD T backward(T g, T z) {
    return z > T(0) ? g : math::normal(g * math::exp_of_nonpositive(-math::abs(z)));
  }
};

// log(1 + exp(z)), and z itself above 20, as in torch. Its derivative sigmoid(z) is 1 - exp(-y), to all digits.
struct Softplus {
  static constexpr Saved saves = Saved::output;
  template <class T>
  static GDBP_HD T forward(T z) {
    const T e = z > T(20) ? T(0) : math::exp_of_nonpositive(-math::abs(z));
    return math::at_least(z, T(0)) + math::log1p(e);
  }
  template <class T>
  static GDBP_HD T backward(T g, T y) {
    const T at_20 = T(20.000000002061153);
    return y > at_20 ? g : g * -math::expm1(-y);
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
    return math::normal(g * (math::normal_cdf(z) + z * math::normal_pdf(z)));
  }
};

// Its approximation by a tanh (Hendrycks and Gimpel, 2016). z (1 + tanh(u)) / 2 cancels for negative z, and
// is the same as z * sigmoid(2u), with 2u = c z (k + z^2), k = 1 / 0.044715, c = 2 sqrt(2 / pi) / k.
struct GeluTanh {
  static constexpr Saved saves = Saved::pre;

  template <class T>
  struct Constants {
    static constexpr bool is_float = math::is_float<T>;
    static constexpr T c_high = T(is_float ? 0x1.244p-4 : 0x1.2444f28p-4);  // half of the digits
    static constexpr T c_low = T(is_float ? 4.7186163e-06 : 5.361872467621785e-10);
    static constexpr T k = T(is_float ? 22.36386 : 22.363860002236386);
    static constexpr T k_low = T(is_float ? 8.2560064e-07 : -3.734262393014057e-17);
    static constexpr T limit = T(is_float ? 11 : 22);  // from here on exp(-2u) is 0
  };

  // exp(-|2u|) for 0 <= x <= limit. The exponential magnifies what 2u loses by rounding up to 700 times, so
  // each sum and product on the way is kept in two parts.
  template <class T>
  static GDBP_HD T exponential(T x) {
    using K = Constants<T>;
    const T x_high = math::upper_half(x);
    const T square = x_high * x_high, square_low = (x - x_high) * (x + x_high);
    const T sum = K::k + square;
    const T lost = K::k > square ? square - (sum - K::k) : K::k - (sum - square);
    const T sum_high = math::upper_half(sum), sum_low = (sum - sum_high) + (lost + square_low + K::k_low);
    const T product = x_high * sum_high;
    const T product_low = (x - x_high) * (sum_high + sum_low) + x_high * sum_low;
    const T high = math::upper_half(product), low = (product - high) + product_low;
    return math::exp_of_sum(-K::c_high * high, -(K::c_high * low + K::c_low * (high + low))).times_below_one(T(1));
  }

  template <class T>
  static GDBP_HD T forward(T z) {
    return z * math::logistic(exponential(math::at_most(math::abs(z), Constants<T>::limit)), z < T(0));
  }
  template <class T>
  static GDBP_HD T backward(T g, T z) {
    using K = Constants<T>;
    const T x = math::at_most(math::abs(z), K::limit);
    const T e = exponential(x);
    const T inverse = math::inverse_of_one_plus(e), small = e * inverse;
    const T slope = (K::c_high + K::c_low) * (K::k + T(3) * x * x);
    return math::normal(g * ((z < T(0) ? small : inverse) + z * (small * inverse * slope)));
  }
};

// Sigmoid linear unit, also called swish (Elfwing et al., 2018; Ramachandran et al., 2017).
struct Silu {
  static constexpr Saved saves = Saved::pre;
  template <class T>
  static GDBP_HD T forward(T z) {
    return z * math::sigmoid(z);
  }
  template <class T>
  static GDBP_HD T backward(T g, T z) {
    const T e = math::exp_of_nonpositive(-math::abs(z)), inverse = math::inverse_of_one_plus(e), small = e * inverse;
    return math::normal(g * ((z < T(0) ? small : inverse) + z * (small * inverse)));
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

// The table: each activation's name in Python, and its struct. A new activation is a struct and a row.
#define GDBP_ACTIVATIONS(ROW) \
  ROW(none, None)             \
  ROW(relu, Relu)             \
  ROW(leaky_relu, LeakyRelu)  \
  ROW(gelu, Gelu)             \
  ROW(gelu_tanh, GeluTanh)    \
  ROW(silu, Silu)             \
  ROW(sigmoid, Sigmoid)       \
  ROW(tanh, Tanh)             \
  ROW(elu, Elu)               \
  ROW(softplus, Softplus)

#define GDBP_ROW(name, Op) name,
enum class Activation : int { GDBP_ACTIVATIONS(GDBP_ROW) };
#undef GDBP_ROW
#define GDBP_ROW(name, Op) Activation::name,
constexpr Activation kActivations[] = {GDBP_ACTIVATIONS(GDBP_ROW)};
#undef GDBP_ROW
#define GDBP_ROW(name, Op) #name,
constexpr const char* kActivationNames[] = {GDBP_ACTIVATIONS(GDBP_ROW)};
#undef GDBP_ROW

// Calls f(Op{}) with the activation's struct.
template <class F>
auto dispatch(Activation activation, F&& f) {
  switch (activation) {
#define GDBP_ROW(name, Op) \
  case Activation::name: return f(Op{});
    GDBP_ACTIVATIONS(GDBP_ROW)
#undef GDBP_ROW
  }
  return f(None{});
}

inline Saved saves(Activation activation) {
  return dispatch(activation, [](auto op) { return decltype(op)::saves; });
}

// The gradient of the pre-activation z where nothing but z was kept.
template <class Op, class T>
GDBP_HD T backward_from_pre(T g, T z) {
  return Op::backward(g, Op::saves == Saved::output ? Op::forward(z) : z);
}

}  // namespace gdbp
