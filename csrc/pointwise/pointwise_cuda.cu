// Losses of single elements on CUDA. Sums are taken in two stages over tiles of fixed size, without atomics,
// so they have the same bits in every run.
#include "common/reduce_cuda.cuh"
#include "pointwise/pointwise.h"

namespace gdbp::pointwise {
namespace {

using cuda::kThreads;
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
  bool vectors;

  __device__ void operator()(int64_t begin, int count) const {
    Compute<T> d[width], g[width];
    difference(begin, count, d);
    if (each) {
      load(grad_output + begin, count, vectors, g);
    } else {
      const auto one = Compute<T>(double(cuda::widen_fast(*grad_output)) * scale);
#pragma unroll
      for (int k = 0; k < width; ++k) g[k] = one;
    }
#pragma unroll
    for (int k = 0; k < width; ++k) d[k] = g[k] * Op::backward(d[k], parameter);
    if (grad_input != nullptr) store(grad_input + begin, count, vectors, d);
#pragma unroll
    for (int k = 0; k < width; ++k) d[k] = -d[k];
    if (grad_target != nullptr) store(grad_target + begin, count, vectors, d);
  }
};

// One block per tile of kTile elements.
template <class T, class Op>
__global__ void __launch_bounds__(kThreads)
    tile_kernel(int64_t numel, const Difference<T> difference, Compute<T> parameter, double* sums) {
  constexpr int width = cuda::kWidth<T>;
  const int64_t first = int64_t(blockIdx.x) * kTile;
  const int64_t end = first + kTile < numel ? first + kTile : numel;
  double sum = 0;
  for (int64_t at = first + int64_t(threadIdx.x) * width; at < end; at += kThreads * width) {
    const int count = int(end - at < width ? end - at : width);
    Compute<T> d[width];
    difference(at, count, d);
#pragma unroll
    for (int k = 0; k < width; ++k) sum += k < count ? double(Op::forward(d[k], parameter)) : 0.0;
  }
  sum = cuda::block_reduce<kThreads>(sum, cuda::Sum{}, 0.0);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    total_kernel(int64_t tiles, const double* GDBP_RESTRICT sums, double divisor, T* output) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < tiles; i += kThreads) sum += sums[i];
  sum = cuda::block_reduce<kThreads>(sum, cuda::Sum{}, 0.0);
  if (threadIdx.x == 0) *output = cuda::narrow_fast<T>(Compute<T>(sum / divisor));
}

template <class T, class Op>
int forward(const Forward& args, void* stream) {
  const Difference<T> difference(args);
  const auto parameter = Compute<T>(args.parameter);
  T* const output = static_cast<T*>(args.output);
  if (args.reduction == Reduction::none) {
    const bool vectors = cuda::aligned(output);
    return cuda::map(args.numel, Elements<T, Op>{difference, parameter, output, vectors}, stream);
  }
  double* const sums = static_cast<double*>(args.workspace);
  const int64_t count = tiles(args.numel, kTile);
  if (count > 0) {
    const auto kernel = tile_kernel<T, Op>;
    const int error =
        GDBP_LAUNCH(kernel, unsigned(count), kThreads, 0, stream, args.numel, difference, parameter, sums);
    if (error != 0) return error;
  }
  const double divisor = args.reduction == Reduction::mean ? double(args.numel) : 1.0;
  return GDBP_LAUNCH(total_kernel<T>, 1, kThreads, 0, stream, count, sums, divisor, output);
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
                      false};
  op.vectors =
      cuda::aligned(op.grad_input) && cuda::aligned(op.grad_target) && (!each || cuda::aligned(op.grad_output));
  return cuda::map(args.numel, op, stream);
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
