// Losses of single elements on CUDA.
#include "common/tiled_sum_cuda.cuh"
#include "pointwise/pointwise.h"

namespace gdbp::pointwise {
namespace {

using cuda::load;
using cuda::store;

// input - target of up to kWidth neighbours
template <class T>
struct Difference {
  static constexpr int width = cuda::kWidth<T>;
  const T* input;
  const T* target;
  bool vectors;

  explicit Difference(const Loss& args)
      : input(static_cast<const T*>(args.input)),
        target(static_cast<const T*>(args.target)),
        vectors(cuda::aligned(input) && cuda::aligned(target)) {}

  __device__ __forceinline__ void operator()(int64_t begin, int count, Compute<T> (&d)[width]) const {
    Compute<T> y[width];
    load(input + begin, count, vectors, d);
    load(target + begin, count, vectors, y);
#pragma unroll
    for (int k = 0; k < width; ++k) d[k] -= y[k];
  }
};

template <class T, class Op>
struct Elements {
  static constexpr int width = cuda::kWidth<T>;
  Difference<T> difference;
  Compute<T> parameter;
  T* output;
  bool vectors;

  __device__ void operator()(int64_t begin, int count) const {
    Compute<T> d[width];
    difference(begin, count, d);
#pragma unroll
    for (int k = 0; k < width; ++k) d[k] = Op::forward(d[k], parameter);
    store(output + begin, count, vectors, d);
  }
};

// The sum of some elements' losses; and their gradients at an upstream gradient of 1, where they are asked for.
template <class T, class Op>
struct Terms {
  static constexpr int width = cuda::kWidth<T>;
  Difference<T> difference;
  Compute<T> parameter;
  Compute<T> factor;  // of the loss in the result
  T* grad_input;      // or null
  bool vectors;

  __device__ double operator()(int64_t begin, int count) const {
    Compute<T> d[width];
    difference(begin, count, d);
    double sum = 0;
#pragma unroll
    for (int k = 0; k < width; ++k) sum += k < count ? double(Op::forward(d[k], parameter)) : 0.0;
    if (grad_input == nullptr) return sum;
#pragma unroll
    for (int k = 0; k < width; ++k) d[k] = factor * Op::backward(d[k], parameter);
    store(grad_input + begin, count, vectors, d);
    return sum;
  }
};

template <class T, class Op>
struct Gradients {
  static constexpr int width = cuda::kWidth<T>;
  Difference<T> difference;
  Compute<T> parameter;
  const T* grad_output;
  T* grad_input;
  T* grad_target;
  double scale;
  bool each;  // one gradient per element, and not one for all
  bool unless_one;
  bool vectors;

  __device__ bool idle() const { return unless_one && cuda::widen_fast(*grad_output) == Compute<T>(1); }
  __device__ void operator()(int64_t begin, int count) const {
    Compute<T> d[width], g[width];
    if (each) {
      load(grad_output + begin, count, vectors, g);
    } else {
      const Compute<T> upstream = cuda::widen_fast(*grad_output);
#pragma unroll
      for (int k = 0; k < width; ++k) g[k] = Compute<T>(double(upstream) * scale);
    }
    difference(begin, count, d);
#pragma unroll
    for (int k = 0; k < width; ++k) d[k] = g[k] * Op::backward(d[k], parameter);
    if (grad_input != nullptr) store(grad_input + begin, count, vectors, d);
#pragma unroll
    for (int k = 0; k < width; ++k) d[k] = -d[k];
    if (grad_target != nullptr) store(grad_target + begin, count, vectors, d);
  }
};

template <class T, class Op>
int forward(const Forward& args, void* stream) {
  const Difference<T> difference(args);
  const auto parameter = Compute<T>(args.parameter);
  T* const output = static_cast<T*>(args.output);
  if (args.reduction == Reduction::none) {
    const bool vectors = cuda::aligned(output);
    return cuda::map(args.numel, Elements<T, Op>{difference, parameter, output, vectors}, stream);
  }
  const double divisor = args.reduction == Reduction::mean ? double(args.numel) : 1.0;
  T* const grad_input = static_cast<T*>(args.grad_input);
  const Terms<T, Op> terms{difference, parameter, Compute<T>(1 / divisor), grad_input, cuda::aligned(grad_input)};
  return cuda::tiled_sum<kTile>(args.numel, terms, divisor, static_cast<double*>(args.workspace), output, stream);
}

template <class T, class Op>
int backward(const Backward& args, void* stream) {
  const bool each = args.reduction == Reduction::none;
  Gradients<T, Op> op{Difference<T>(args),
                      Compute<T>(args.parameter),
                      static_cast<const T*>(args.grad_output),
                      static_cast<T*>(args.grad_input),
                      static_cast<T*>(args.grad_target),
                      args.reduction == Reduction::mean ? 1.0 / double(args.numel) : 1.0,
                      each,
                      args.unless_one,
                      false};
  op.vectors =
      cuda::aligned(op.grad_input) && cuda::aligned(op.grad_target) && (!each || cuda::aligned(op.grad_output));
  return cuda::map(args.numel, op, stream, args.unless_one ? cuda::kFewBlocks : cuda::kMaxBlocks);
}

// Calls f with the element type and the loss as types.
template <class F>
int dispatch_both(const Loss& loss, const F& f) {
  return gdbp::dispatch(loss.dtype,
                        [&](auto type) { return dispatch(loss.kind, [&](auto op) { return f(type, op); }); });
}

}  // namespace

int forward_cuda(const Forward& args, void* stream) {
  return dispatch_both(
      args, [&](auto type, auto op) { return forward<typename decltype(type)::type, decltype(op)>(args, stream); });
}

int backward_cuda(const Backward& args, void* stream) {
  return dispatch_both(
      args, [&](auto type, auto op) { return backward<typename decltype(type)::type, decltype(op)>(args, stream); });
}

}  // namespace gdbp::pointwise
