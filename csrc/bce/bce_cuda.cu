// Binary cross-entropy on CUDA.
#include "bce/bce.h"
#include "bce/bce_math.h"
#include "common/tiled_sum_cuda.cuh"

namespace gdbp::bce {
namespace {

using cuda::load;
using cuda::store;

// Up to kWidth neighbours, and their factors.
template <class T>
struct Elements {
  using C = Compute<T>;
  static constexpr int width = cuda::kWidth<T>;
  const T* input;
  const T* target;
  const T* weight;
  const T* pos_weight;
  int64_t weight_period, pos_weight_period;
  bool vectors;

  explicit Elements(const Loss& a)
      : input(static_cast<const T*>(a.input)),
        target(static_cast<const T*>(a.target)),
        weight(static_cast<const T*>(a.weight.data)),
        pos_weight(static_cast<const T*>(a.pos_weight.data)),
        weight_period(a.weight.period),
        pos_weight_period(a.pos_weight.period),
        vectors(cuda::aligned(input) && cuda::aligned(target)) {}

  // Calls f(k, x, t, w, q) for each of `count` elements from `begin` on.
  template <class F>
  __device__ __forceinline__ void operator()(int64_t begin, int count, F f) const {
    C x[width], t[width];
    load(input + begin, count, vectors, x);
    load(target + begin, count, vectors, t);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (k >= count) continue;
      const int64_t i = begin + k;
      const C w = weight != nullptr ? C(cuda::widen_fast(weight[i % weight_period])) : C(1);
      const C q = pos_weight != nullptr ? C(cuda::widen_fast(pos_weight[i % pos_weight_period])) : C(1);
      f(k, x[k], t[k], w, q);
    }
  }
};

template <class T>
struct Losses {
  using C = Compute<T>;
  static constexpr int width = cuda::kWidth<T>;
  Elements<T> elements;
  T* output;
  bool vectors;

  __device__ void operator()(int64_t begin, int count) const {
    C out[width];
    elements(begin, count, [&](int k, C x, C t, C w, C q) { out[k] = w * loss(Logit<C>(x), t, q); });
    store(output + begin, count, vectors, out);
  }
};

// The sum of some elements' losses; and their gradients at an upstream gradient of 1, where they are asked for.
template <class T>
struct Terms {
  using C = Compute<T>;
  static constexpr int width = cuda::kWidth<T>;
  Elements<T> elements;
  C factor;       // of the loss in the result
  T* grad_input;  // or null
  bool vectors;

  __device__ double operator()(int64_t begin, int count) const {
    double sum = 0;
    if (grad_input == nullptr) {
      elements(begin, count, [&](int, C x, C t, C w, C q) { sum += double(w * loss(Logit<C>(x), t, q)); });
      return sum;
    }
    C dx[width];
    elements(begin, count, [&](int k, C x, C t, C w, C q) {
      const Logit<C> at(x);
      sum += double(w * loss(at, t, q));
      dx[k] = factor * (w * input_slope(at, t, q));
    });
    store(grad_input + begin, count, vectors, dx);
    return sum;
  }
};

template <class T>
struct Gradients {
  using C = Compute<T>;
  static constexpr int width = cuda::kWidth<T>;
  Elements<T> elements;
  const T* grad_output;
  T* grad_input;
  T* grad_target;
  double scale;
  bool each;  // one gradient per element, and not one for all
  bool unless_one;
  bool vectors;

  __device__ bool idle() const { return unless_one && cuda::widen_fast(*grad_output) == C(1); }
  __device__ void operator()(int64_t begin, int count) const {
    C upstream[width], dx[width], dt[width];
    if (each) {
      load(grad_output + begin, count, vectors, upstream);
    } else {
      const C one = cuda::widen_fast(*grad_output);
#pragma unroll
      for (int k = 0; k < width; ++k) upstream[k] = C(double(one) * scale);
    }
    elements(begin, count, [&](int k, C x, C t, C w, C q) {
      const Logit<C> at(x);
      dx[k] = upstream[k] * (w * input_slope(at, t, q));
      dt[k] = upstream[k] * (w * target_slope(at, q));
    });
    if (grad_input != nullptr) store(grad_input + begin, count, vectors, dx);
    if (grad_target != nullptr) store(grad_target + begin, count, vectors, dt);
  }
};

template <class T>
int forward(const Forward& a, void* stream) {
  const Elements<T> elements(a);
  T* const output = static_cast<T*>(a.output);
  if (a.reduction == Reduction::none)
    return cuda::map(a.numel, Losses<T>{elements, output, cuda::aligned(output)}, stream);
  const double divisor = a.reduction == Reduction::mean ? double(a.numel) : 1.0;
  T* const grad_input = static_cast<T*>(a.grad_input);
  const Terms<T> terms{elements, Compute<T>(1 / divisor), grad_input, cuda::aligned(grad_input)};
  return cuda::tiled_sum<kTile>(a.numel, terms, divisor, static_cast<double*>(a.workspace), output, stream);
}

template <class T>
int backward(const Backward& a, void* stream) {
  const bool each = a.reduction == Reduction::none;
  Gradients<T> op{Elements<T>(a),
                  static_cast<const T*>(a.grad_output),
                  static_cast<T*>(a.grad_input),
                  static_cast<T*>(a.grad_target),
                  a.reduction == Reduction::mean ? 1.0 / double(a.numel) : 1.0,
                  each,
                  a.unless_one,
                  false};
  op.vectors =
      cuda::aligned(op.grad_input) && cuda::aligned(op.grad_target) && (!each || cuda::aligned(op.grad_output));
  return cuda::map(a.numel, op, stream, a.unless_one ? cuda::kFewBlocks : cuda::kMaxBlocks);
}

}  // namespace

int forward_cuda(const Forward& a, void* stream) {
  return dispatch(a.dtype, [&](auto type) { return forward<typename decltype(type)::type>(a, stream); });
}

int backward_cuda(const Backward& a, void* stream) {
  return dispatch(a.dtype, [&](auto type) { return backward<typename decltype(type)::type>(a, stream); });
}

}  // namespace gdbp::bce
