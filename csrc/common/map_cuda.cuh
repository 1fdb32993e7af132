// One pass over n elements: each thread takes kWidth neighbours at a time, in grid strides.
#pragma once
#include "common/dtype_cuda.cuh"

namespace gdbp::cuda {

constexpr int kThreads = 256;
// Enough blocks to fill any GPU several times over; beyond it, a block loops.
constexpr int64_t kMaxBlocks = 16384;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many of `width` neighbours from `first` on come before `end`.
template <int width>
__device__ __forceinline__ int neighbours(int64_t first, int64_t end) {
  const int64_t left = end - first;
  return left >= width ? width : left > 0 ? int(left) : 0;
}

// `op(begin, count)` handles the elements [begin, begin + count), count <= op.width.
template <class Op>
__global__ void __launch_bounds__(kThreads) map_kernel(int64_t n, Op op) {
  const int64_t stride = int64_t(gridDim.x) * kThreads * Op::width;
  int64_t begin = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * Op::width;
  for (; begin < n; begin += stride) op(begin, neighbours<Op::width>(begin, n));
}

// Of a kernel that may find nothing to do: to start many blocks would then be all its cost.
constexpr int64_t kFewBlocks = 2048;

template <class Op>
int map(int64_t n, const Op& op, void* stream, int64_t most_blocks = kMaxBlocks) {
  if (n == 0) return 0;
  const int64_t blocks = ceil_div(n, kThreads * Op::width);
  const unsigned grid = unsigned(blocks < most_blocks ? blocks : most_blocks);
  return GDBP_LAUNCH(map_kernel<Op>, grid, kThreads, 0, stream, n, op);
}

}  // namespace gdbp::cuda
