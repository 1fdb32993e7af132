// Activations as kernels compute them whose results are elements of T. For 16 bits half of the arithmetic or less
// will do to round as the exact ones, all but once in some hundred times: without it that arithmetic is what kernels
// wait for, and not memory.
#pragma once
#include "common/activations.h"
#include "common/math_cuda.cuh"

namespace gdbp::cuda {

// 1 / (1 + e) and its complement, of e = exp(-|u|): the sigmoid of u, and what its derivative is made of.
struct Logistic {
  float large, small;

  __device__ __forceinline__ explicit Logistic(float e) : large(inverse_approx(1 + e)), small(e * large) {}
  __device__ __forceinline__ float of(float u) const { return u < 0 ? small : large; }
  __device__ __forceinline__ float slope() const { return small * large; }
};

struct HalfSigmoid : Sigmoid {
  __device__ __forceinline__ static float forward(float z) { return Logistic(exp_approx(-math::abs(z))).of(z); }
};

struct HalfSilu : Silu {
  __device__ __forceinline__ static float forward(float z) { return z * HalfSigmoid::forward(z); }
  __device__ __forceinline__ static float backward(float g, float z) {
    const Logistic sigmoid(exp_approx(-math::abs(z)));
    return g * (sigmoid.of(z) + z * sigmoid.slope());
  }
};

struct HalfGeluTanh : GeluTanh {
  using K = Constants<float>;
  static constexpr float c = K::c_high + K::c_low;

  __device__ __forceinline__ static float forward(float z) {
    const float x = math::at_most(math::abs(z), K::limit);
    return z * Logistic(exp_approx(-c * x * (K::k + x * x))).of(z);
  }
  __device__ __forceinline__ static float backward(float g, float z) {
    const float x = math::at_most(math::abs(z), K::limit), square = x * x;
    const Logistic sigmoid(exp_approx(-c * x * (K::k + square)));
    return g * (sigmoid.of(z) + z * (sigmoid.slope() * c * (K::k + 3 * square)));
  }
};

// As in math_normal.h, with a polynomial of the smallest largest relative error, 3.2e-6.
struct HalfGelu : Gelu {
  struct Normal {
    float gaussian, cdf;

    __device__ __forceinline__ explicit Normal(float z) {
      const float x = math::at_most(math::abs(z), math::Format<float>::normal_max);
      const float w = inverse_approx(x + 4), t = 2 * (x * w) - 1;
      gaussian = exp_approx(-0.5f * x * x);
      const float tail = gaussian * w *
                         math::polynomial(t, 0.75528711f, -0.60788548f, 0.38703468f, -0.18668795f, 0.061104715f,
                                          -0.006663586f, -0.0046572303f);
      cdf = z < 0 ? tail : 1 - tail;
    }
  };
  __device__ __forceinline__ static float forward(float z) { return z * Normal(z).cdf; }
  __device__ __forceinline__ static float backward(float g, float z) {
    const Normal normal(z);
    return g * (normal.cdf + z * (normal.gaussian * 0.39894228f));
  }
};

struct HalfTanh : Tanh {
  __device__ __forceinline__ static float forward(float z) {
    const float a = math::abs(z), square = a * a, e = exp_approx(-2 * a);
    const float near = a * math::polynomial(square, 1.0f, -0.33333333f, 0.13333333f, -0.053968254f);
    return math::copysign(a < 0.25f ? near : (1 - e) * inverse_approx(1 + e), z);
  }
};

template <class Op>
Op half_of(Op);
HalfSigmoid half_of(Sigmoid);
HalfSilu half_of(Silu);
HalfGeluTanh half_of(GeluTanh);
HalfGelu half_of(Gelu);
HalfTanh half_of(Tanh);

// The activation's struct for results of type T.
template <class T, class Op>
using ActivationIn = std::conditional_t<sizeof(T) == 2, decltype(half_of(Op{})), Op>;

// As dispatch() of activations.h, on the device, for results of type T. All lanes take the same branch.
template <class T, class F>
__device__ __forceinline__ void for_activation(Activation activation, const F& f) {
  switch (activation) {
#define GDBP_ROW(name, Op) \
  case Activation::name: return f(ActivationIn<T, Op>{});
    GDBP_ACTIVATIONS(GDBP_ROW)
#undef GDBP_ROW
  }
}

}  // namespace gdbp::cuda
