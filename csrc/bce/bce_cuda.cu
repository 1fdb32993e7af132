// Binary cross-entropy on CUDA. Sums are taken in two stages over tiles of fixed size, without atomics, so they have
// the same bits in every run.
#include "bce/bce.h"
#include "bce/bce_math.h"
#include "common/reduce_cuda.cuh"

namespace gdbp::bce {
namespace {

using cuda::kThreads;
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
  bool vectors;

  __device__ void operator()(int64_t begin, int count) const {
    C upstream[width], dx[width], dt[width];
    if (each) {
      load(grad_output + begin, count, vectors, upstream);
    } else {
      const C one = C(double(cuda::widen_fast(*grad_output)) * scale);
#pragma unroll
      for (int k = 0; k < width; ++k) upstream[k] = one;
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

// One block per tile of kTile elements.
template <class T>
__global__ void __launch_bounds__(kThreads) tile_kernel(int64_t numel, const Elements<T> elements, double* sums) {
  using C = Compute<T>;
  constexpr int width = cuda::kWidth<T>;
  const int64_t first = int64_t(blockIdx.x) * kTile;
  const int64_t end = first + kTile < numel ? first + kTile : numel;
  double sum = 0;
  for (int64_t at = first + int64_t(threadIdx.x) * width; at < end; at += kThreads * width) {
    const int count = int(end - at < width ? end - at : width);
    elements(at, count, [&](int, C x, C t, C w, C q) { sum += double(w * loss(Logit<C>(x), t, q)); });
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

template <class T>
int forward(const Forward& a, void* stream) {
  const Elements<T> elements(a);
  T* const output = static_cast<T*>(a.output);
  if (a.reduction == Reduction::none)
    return cuda::map(a.numel, Losses<T>{elements, output, cuda::aligned(output)}, stream);
  double* const sums = static_cast<double*>(a.workspace);
  const int64_t count = tiles(a.numel, kTile);
  if (count > 0) {
    const int error = GDBP_LAUNCH(tile_kernel<T>, unsigned(count), kThreads, 0, stream, a.numel, elements, sums);
    if (error != 0) return error;
  }
  const double divisor = a.reduction == Reduction::mean ? double(a.numel) : 1.0;
  return GDBP_LAUNCH(total_kernel<T>, 1, kThreads, 0, stream, count, sums, divisor, output);
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
                  false};
  op.vectors =
      cuda::aligned(op.grad_input) && cuda::aligned(op.grad_target) && (!each || cuda::aligned(op.grad_output));
  return cuda::map(a.numel, op, stream);
}

}  // namespace

int forward_cuda(const Forward& a, void* stream) {
  return dispatch(a.dtype, [&](auto type) { return forward<typename decltype(type)::type>(a, stream); });
}

int backward_cuda(const Backward& a, void* stream) {
  return dispatch(a.dtype, [&](auto type) { return backward<typename decltype(type)::type>(a, stream); });
}

}  // namespace gdbp::bce
