// The sum over n elements, by tiles and then over these, in a fixed order and without atomics: the same bits in every
// run.
#pragma once
#include "common/reduce_cuda.cuh"

namespace gdbp::cuda {

// `op(begin, count)` returns the sum over the elements [begin, begin + count), count <= op.width. One block for each
// tile; the only tile's sum is the total.
template <int64_t tile, class T, class Op>
__global__ void __launch_bounds__(kThreads)
    tile_sum_kernel(int64_t n, const Op op, double divisor, double* sums, T* total) {
  const int64_t first = int64_t(blockIdx.x) * tile, end = first + tile < n ? first + tile : n;
  double sum = 0;
  for (int64_t at = first + int64_t(threadIdx.x) * Op::width; at < end; at += kThreads * Op::width)
    sum += op(at, neighbours<Op::width>(at, end));
  sum = block_reduce<kThreads>(sum, Sum{}, 0.0);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    *total = narrow_fast<T>(Compute<T>(sum / divisor));
  } else {
    sums[blockIdx.x] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_of_tiles_kernel(int64_t count, const double* GDBP_RESTRICT sums, double divisor, T* total) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += sums[i];
  sum = block_reduce<kThreads>(sum, Sum{}, 0.0);
  if (threadIdx.x == 0) *total = narrow_fast<T>(Compute<T>(sum / divisor));
}

// total: one element, for the sum over `divisor`; sums: one double for each tile.
template <int64_t tile, class T, class Op>
int tiled_sum(int64_t n, const Op& op, double divisor, double* sums, T* total, void* stream) {
  const int64_t count = ceil_div(n, tile);
  const auto kernel = tile_sum_kernel<tile, T, Op>;
  const int error =
      GDBP_LAUNCH(kernel, unsigned(count > 1 ? count : 1), kThreads, 0, stream, n, op, divisor, sums, total);
  if (error != 0 || count <= 1) return error;
  return GDBP_LAUNCH(sum_of_tiles_kernel<T>, 1, kThreads, 0, stream, count, sums, divisor, total);
}

}  // namespace gdbp::cuda
