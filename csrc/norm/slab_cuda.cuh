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

  // f(column, sums) for each of the block's columns, in one thread: of n values of every thread their sums, in a fixed
  // tree. What f leaves in shared memory all threads may read afterwards. One thread, for a channel's arithmetic is in
  // float64, of which many GPUs have next to none: 512 times over it would outlast the walk.
  template <int n, class F>
  __device__ __forceinline__ void for_sums(const C (&own)[n][width], const F& f) const {
    constexpr int warps = kSlabThreads / cuda::kWarp;
    __shared__ double of_warps[n][warps][columns];
    const int lane = int(threadIdx.x) % cuda::kWarp, group = int(threadIdx.x) % kSlabGroups;
#pragma unroll
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        double value = double(own[i][k]);
#pragma unroll
        for (int distance = cuda::kWarp / 2; distance >= kSlabGroups; distance /= 2)
          value += __shfl_xor_sync(cuda::kAllLanes, value, distance);
        if (lane < kSlabGroups) of_warps[i][threadIdx.x / cuda::kWarp][group * width + k] = value;
      }
    }
    __syncthreads();
    for_columns([&](int column) {
      double sums[n] = {};
#pragma unroll
      for (int i = 0; i < n; ++i)
        for (int warp = 0; warp < warps; ++warp) sums[i] += of_warps[i][warp][column];
      f(column, sums);
    });
  }
  // f(column), likewise.
  template <class F>
  __device__ __forceinline__ void for_columns(const F& f) const {
    if (threadIdx.x < columns) f(int(threadIdx.x));
    __syncthreads();
  }
  // The channel of a column, or -1 beyond the last one.
  __device__ __forceinline__ int64_t channel(int column) const {
    const int64_t at = int64_t(blockIdx.x) * columns + column;
    return at < cols ? at : -1;
  }
  // What is this thread's of the columns' values.
  template <class Value>
  __device__ __forceinline__ void take(const Value (&of_columns)[columns], Value (&own)[width]) const {
#pragma unroll
    for (int k = 0; k < width; ++k) own[k] = of_columns[int(threadIdx.x) % kSlabGroups * width + k];
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
  __shared__ C pivots[Slab<T>::columns];
  __shared__ Normalize<C> normalizers[Slab<T>::columns];
  // Sums are taken about the mean of the first rows: of what they add up little cancels.
  C begin[1][width] = {}, pivot[width];
  const int64_t first = rows < kSlabSteps ? rows : kSlabSteps;
  slab.for_rows(first, [&](int64_t at) { cuda::load(input + at, slab.count, vectors, begin[0]); });
  slab.for_sums(begin, [&](int column, const double (&sum)[1]) { pivots[column] = C(sum[0] / double(first)); });
  slab.take(pivots, pivot);
  C sums[2][width] = {};  // of the differences, of their squares
  slab.for_rows(rows, [&](int64_t at) {
    C x[width];
    cuda::load(input + at, slab.count, vectors, x);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const C d = x[k] - pivot[k];
      sums[0][k] += d;
      sums[1][k] += d * d;
    }
  });
  slab.for_sums(sums, [&](int column, const double (&sum)[2]) {
    const int64_t channel = slab.channel(column);
    normalizers[column] = {};
    if (channel < 0) return;
    const Moments moments = Moments::about(double(pivots[column]), double(rows), sum[0], sum[1]);
    const double variance = moments.squares / double(rows);
    normalizers[column] =
        Normalize<C>::of(moments.mean, variance, eps, or_else(weight, channel, 1), or_else(bias, channel, 0));
    stats[channel] = moments.mean;
    stats[cols + channel] = variance;
  });
  Normalize<C> normalize[width];
  slab.take(normalizers, normalize);
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
  __shared__ Normalize<C> normalizers[Slab<T>::columns];
  __shared__ C slopes[Slab<T>::columns], offsets[Slab<T>::columns];
  slab.for_columns([&](int column) {
    const int64_t channel = slab.channel(column);
    normalizers[column] = {};
    if (channel < 0) return;
    normalizers[column] = Normalize<C>::of(stats[channel], stats[cols + channel], eps, or_else(weight, channel, 1),
                                           or_else(bias, channel, 0));
  });
  Normalize<C> normalize[width];
  slab.take(normalizers, normalize);
  // x, and the gradient of what the activation saw.
  const auto load = [&](int64_t at, C(&x)[width], C(&g)[width]) {
    cuda::load(grad_output + at, slab.count, vectors, g);
    cuda::load(input + at, slab.count, vectors, x);
#pragma unroll
    for (int k = 0; k < width; ++k) g[k] = backward_from_pre<Op>(g[k], normalize[k](x[k]));
  };
  C sums[2][width] = {};  // of the gradients, of their products with x
  slab.for_rows(rows, [&](int64_t at) {
    C x[width], g[width];
    load(at, x, g);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      sums[0][k] += g[k];
      sums[1][k] += g[k] * (x[k] - normalize[k].center);
    }
  });
  slab.for_sums(sums, [&](int column, const double (&sum)[2]) {
    const int64_t channel = slab.channel(column);
    slopes[column] = offsets[column] = C(0);
    if (channel < 0) return;
    const auto gradients = Gradients<C>::of(stats[channel], stats[cols + channel], eps, or_else(weight, channel, 1),
                                            double(rows), sum[0], sum[1], of_batch);
    slopes[column] = gradients.slope;
    offsets[column] = gradients.offset;
    if (grad_weight != nullptr) grad_weight[channel] = gradients.weight;
    if (grad_bias != nullptr) grad_bias[channel] = gradients.bias;
  });
  if (grad_input == nullptr) return;
  C slope[width], offset[width];
  slab.take(slopes, slope);
  slab.take(offsets, offset);
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
