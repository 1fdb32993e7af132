// Batch normalisation of columns that are no longer than what a block's threads hold in registers: one launch does it
// all, and reads once. Of small matrices launches are most of the time.
#pragma once
#include "norm/columns_cuda.cuh"

namespace gdbp::norm {
namespace {

// Two vectors across, 32 bytes, which is what memory is read in.
constexpr int kSlabGroups = 2, kSlabThreads = 512, kSlabSteps = kSlabThreads / kSlabGroups;
// A block can't hold more; and where it would walk, tiles on all multiprocessors are faster.
template <class T>
constexpr int64_t kSlabRows = kUnroll<T> * kSlabSteps;

template <class T>
struct Slab {
  static constexpr int width = cuda::kWidth<T>, columns = kSlabGroups * width;
  int64_t first;  // of its columns, which are as many channels
  int channels;
  Rows<T> rows;
  int64_t at;  // this thread's first element

  __device__ __forceinline__ Slab(int64_t row_count, int64_t cols, bool vectors)
      : first(int64_t(blockIdx.x) * columns),
        channels(cuda::neighbours<columns>(first, cols)),
        rows(threadIdx.y, kSlabSteps, row_count, cols,
             cuda::neighbours<width>(first + int64_t(threadIdx.x) * width, cols), vectors),
        at(int64_t(threadIdx.y) * cols + first + int64_t(threadIdx.x) * width) {}

  template <int n, class F>
  __device__ __forceinline__ void for_sums(const Compute<T> (&own)[n][width], const F& f) const {
    norm::for_sums<kSlabThreads, kSlabGroups>(own, channels, true, f);
  }
};

template <class T, class Op>
__global__ void __launch_bounds__(kSlabThreads)
    slab_forward_kernel(int64_t rows, Channels<Compute<T>> channels, Activated<T, Op> activated, const T* input,
                        T* output, bool vectors) {
  using C = Compute<T>;
  constexpr int width = Slab<T>::width;
  const Slab<T> slab(rows, channels.count, vectors);
  __shared__ C pivots[Slab<T>::columns];
  __shared__ Normalize<C> normalizers[Slab<T>::columns];
  C x[kUnroll<T>][width];
  slab.rows.load(input + slab.at, x);
  // Sums are taken about the mean as far as it is known without them: of what they add up little cancels.
  C sum[1][width] = {}, pivot[width];
#pragma unroll
  for (int r = 0; r < kUnroll<T>; ++r)
#pragma unroll
    for (int k = 0; k < width; ++k) sum[0][k] += slab.rows.has(r) ? x[r][k] : C(0);
  slab.for_sums(sum, [&](int column, const double (&total)[1]) { pivots[column] = C(total[0] / double(rows)); });
  take(pivots, true, pivot);
  C sums[2][width] = {};  // of the differences, of their squares
#pragma unroll
  for (int r = 0; r < kUnroll<T>; ++r) {
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const C d = slab.rows.has(r) ? x[r][k] - pivot[k] : C(0);
      sums[0][k] += d;
      sums[1][k] += d * d;
    }
  }
  slab.for_sums(sums, [&](int column, const double (&total)[2]) {
    const int64_t channel = slab.first + column;
    const Moments moments = Moments::about(double(pivots[column]), double(rows), total[0], total[1]);
    const double variance = moments.squares / double(rows);
    normalizers[column] = channels.normalize(channel, moments.mean, variance);
    channels.keep(channel, moments.mean, variance);
  });
  Normalize<C> normalize[width];
  take(normalizers, true, normalize);
  activated.forward(normalize, x);
  slab.rows.store(output + slab.at, x);
}

template <class T, class Op>
__global__ void __launch_bounds__(kSlabThreads)
    slab_backward_kernel(int64_t rows, Channels<Compute<T>> channels, Activated<T, Op> activated, const T* grad_output,
                         const T* input, T* grad_input, bool vectors) {
  using C = Compute<T>;
  constexpr int width = Slab<T>::width;
  const Slab<T> slab(rows, channels.count, vectors);
  __shared__ Backpropagate<C> backpropagators[Slab<T>::columns];
  C x[kUnroll<T>][width], g[kUnroll<T>][width];
  slab.rows.load(input + slab.at, x);
  slab.rows.load(grad_output + slab.at, g);
  for_columns(slab.channels, [&](int column) {
    const int64_t channel = slab.first + column;
    backpropagators[column] = {channels.normalize(channel, channels.mean(channel), channels.variance(channel)), 0, 0};
  });
  Backpropagate<C> back[width];
  take(backpropagators, true, back);
  C sums[2][width] = {};  // of the gradients, of their products with x
  activated.backward(back, x, g);
#pragma unroll
  for (int r = 0; r < kUnroll<T>; ++r) {
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (!slab.rows.has(r)) continue;
      sums[0][k] += g[r][k];
      sums[1][k] += g[r][k] * (x[r][k] - back[k].center);
    }
  }
  slab.for_sums(sums, [&](int column, const double (&total)[2]) {
    const int64_t channel = slab.first + column;
    const auto gradients = channels.gradients(channel, double(rows), total);
    channels.keep(channel, gradients);
    backpropagators[column].slope = gradients.slope;
    backpropagators[column].offset = gradients.offset;
  });
  if (grad_input == nullptr) return;
  take(backpropagators, true, back);
#pragma unroll
  for (int r = 0; r < kUnroll<T>; ++r)
#pragma unroll
    for (int k = 0; k < width; ++k) g[r][k] = back[k].gradient(g[r][k], x[r][k]);
  slab.rows.store(grad_input + slab.at, g);
}

// Whether a slab's block takes the matrix.
template <class T>
bool suits_slabs(const Planes& planes) {
  return planes.by_column && planes.rows > 0 && planes.rows <= kSlabRows<T> && planes.cols > 0;
}
const dim3 kSlabBlock(kSlabGroups, kSlabSteps);
template <class T>
unsigned slabs_of(const Planes& planes) {
  return unsigned(cuda::ceil_div(planes.cols, Slab<T>::columns));
}

}  // namespace
}  // namespace gdbp::norm
