// Batch normalisation of columns that are no longer than a block can walk down: one launch does it all, and what it
// reads again is in the multiprocessor's cache. Of small matrices launches are most of the time.
#pragma once
#include "common/reduce_cuda.cuh"
#include "norm/norm.h"

namespace gdbp::norm {
namespace {

// Two vectors across, 32 bytes, which is what memory is read in.
constexpr int kSlabGroups = 2, kSlabThreads = 512, kSlabSteps = kSlabThreads / kSlabGroups;
// Further down the tiles of many blocks are faster than one block's walk.
constexpr int64_t kSlabRows = 8192;

template <class T>
struct Slab {
  using C = Compute<T>;
  static constexpr int width = cuda::kWidth<T>, columns = kSlabGroups * width;

  int64_t cols, col;
  int count;  // of this thread's columns, neighbours from `col` on

  __device__ __forceinline__ explicit Slab(int64_t cols)
      : cols(cols),
        col((int64_t(blockIdx.x) * kSlabGroups + threadIdx.x % kSlabGroups) * width),
        count(cuda::neighbours<width>(col, cols)) {}

  // f(the place of the thread's first element) for its rows up to `end`.
  template <class F>
  __device__ __forceinline__ void for_rows(int64_t end, const F& f) const {
    if (count == 0) return;
#pragma unroll 2
    for (int64_t row = threadIdx.x / kSlabGroups; row < end; row += kSlabSteps) f(row * cols + col);
  }

  // Of each column the sum over all threads, in a fixed tree; all of them get it.
  __device__ __forceinline__ void sum(const C (&own)[width], double (&total)[width]) const {
    constexpr int warps = kSlabThreads / cuda::kWarp;
    __shared__ double of_warps[warps][columns], of_block[columns];
    const int lane = int(threadIdx.x) % cuda::kWarp, group = int(threadIdx.x) % kSlabGroups;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      double value = double(own[k]);
#pragma unroll
      for (int distance = cuda::kWarp / 2; distance >= kSlabGroups; distance /= 2)
        value += __shfl_xor_sync(cuda::kAllLanes, value, distance);
      if (lane < kSlabGroups) of_warps[threadIdx.x / cuda::kWarp][group * width + k] = value;
    }
    __syncthreads();
    if (threadIdx.x < columns) {
      double value = 0;
      for (int warp = 0; warp < warps; ++warp) value += of_warps[warp][threadIdx.x];
      of_block[threadIdx.x] = value;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < width; ++k) total[k] = of_block[group * width + k];
  }
};

template <class C>
__device__ __forceinline__ double or_else(const C* values, int64_t at, double otherwise) {
  return values != nullptr ? double(values[at]) : otherwise;
}

template <class T, class Op>
__global__ void __launch_bounds__(kSlabThreads)
    slab_forward_kernel(int64_t rows, int64_t cols, const T* input, const Compute<T>* weight, const Compute<T>* bias,
                        double eps, double* stats, T* output, bool vectors) {
  using C = Compute<T>;
  constexpr int width = Slab<T>::width;
  const Slab<T> slab(cols);
  // Sums are taken about the mean of the first rows: of what they add up little cancels.
  C sum[width] = {}, squares[width] = {}, pivot[width];
  double total[width], total_squares[width];
  const int64_t first = rows < kSlabSteps ? rows : kSlabSteps;
  slab.for_rows(first, [&](int64_t at) { cuda::load(input + at, slab.count, vectors, sum); });
  slab.sum(sum, total);
#pragma unroll
  for (int k = 0; k < width; ++k) {
    pivot[k] = C(total[k] / double(first));
    sum[k] = C(0);
  }
  slab.for_rows(rows, [&](int64_t at) {
    C x[width];
    cuda::load(input + at, slab.count, vectors, x);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const C d = x[k] - pivot[k];
      sum[k] += d;
      squares[k] += d * d;
    }
  });
  slab.sum(sum, total);
  slab.sum(squares, total_squares);
  Normalize<C> normalize[width] = {};
#pragma unroll
  for (int k = 0; k < width; ++k) {
    if (k >= slab.count) continue;
    const int64_t channel = slab.col + k;
    const Moments moments = Moments::about(double(pivot[k]), double(rows), total[k], total_squares[k]);
    const double variance = moments.squares / double(rows);
    normalize[k] =
        Normalize<C>::of(moments.mean, variance, eps, or_else(weight, channel, 1), or_else(bias, channel, 0));
    if (threadIdx.x >= kSlabGroups) continue;
    stats[channel] = moments.mean;
    stats[cols + channel] = variance;
  }
  slab.for_rows(rows, [&](int64_t at) {
    C x[width];
    cuda::load(input + at, slab.count, vectors, x);
#pragma unroll
    for (int k = 0; k < width; ++k) x[k] = Op::forward(normalize[k](x[k]));
    cuda::store(output + at, slab.count, vectors, x);
  });
}

template <class T, class Op>
__global__ void __launch_bounds__(kSlabThreads)
    slab_backward_kernel(int64_t rows, int64_t cols, const T* grad_output, const T* input, const Compute<T>* weight,
                         const Compute<T>* bias, const double* stats, double eps, bool of_batch, T* grad_input,
                         Compute<T>* grad_weight, Compute<T>* grad_bias, bool vectors) {
  using C = Compute<T>;
  constexpr int width = Slab<T>::width;
  const Slab<T> slab(cols);
  Normalize<C> normalize[width] = {};
#pragma unroll
  for (int k = 0; k < width; ++k) {
    if (k >= slab.count) continue;
    const int64_t channel = slab.col + k;
    normalize[k] = Normalize<C>::of(stats[channel], stats[cols + channel], eps, or_else(weight, channel, 1),
                                    or_else(bias, channel, 0));
  }
  // x, and the gradient of what the activation saw.
  const auto load = [&](int64_t at, C(&x)[width], C(&g)[width]) {
    cuda::load(grad_output + at, slab.count, vectors, g);
    cuda::load(input + at, slab.count, vectors, x);
#pragma unroll
    for (int k = 0; k < width; ++k) g[k] = backward_from_pre<Op>(g[k], normalize[k](x[k]));
  };
  C sum[width] = {}, product[width] = {};
  slab.for_rows(rows, [&](int64_t at) {
    C x[width], g[width];
    load(at, x, g);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      sum[k] += g[k];
      product[k] += g[k] * (x[k] - normalize[k].center);
    }
  });
  double total[width], total_products[width];
  slab.sum(sum, total);
  slab.sum(product, total_products);
  C slope[width] = {}, offset[width] = {};
#pragma unroll
  for (int k = 0; k < width; ++k) {
    if (k >= slab.count) continue;
    const int64_t channel = slab.col + k;
    const auto gradients = Gradients<C>::of(stats[channel], stats[cols + channel], eps, or_else(weight, channel, 1),
                                            double(rows), total[k], total_products[k], of_batch);
    slope[k] = gradients.slope;
    offset[k] = gradients.offset;
    if (threadIdx.x >= kSlabGroups) continue;
    if (grad_weight != nullptr) grad_weight[channel] = gradients.weight;
    if (grad_bias != nullptr) grad_bias[channel] = gradients.bias;
  }
  if (grad_input == nullptr) return;
  slab.for_rows(rows, [&](int64_t at) {
    C x[width], g[width];
    load(at, x, g);
#pragma unroll
    for (int k = 0; k < width; ++k)
      g[k] = input_gradient(g[k], x[k], normalize[k].center, normalize[k].scale, slope[k], offset[k]);
    cuda::store(grad_input + at, slab.count, vectors, g);
  });
}

// Whether a slab's block takes the matrix.
inline bool suits_slabs(const Planes& planes) {
  return planes.by_column && planes.rows > 0 && planes.rows <= kSlabRows && planes.cols > 0;
}
template <class T>
unsigned slabs_of(const Planes& planes) {
  return unsigned(cuda::ceil_div(planes.cols, Slab<T>::columns));
}

}  // namespace
}  // namespace gdbp::norm
