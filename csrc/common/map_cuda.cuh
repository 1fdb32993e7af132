// One pass over n elements: each thread takes kWidth neighbours at a time, in grid strides.
#pragma once
#include "common/dtype_cuda.cuh"

namespace gdbp::cuda {

constexpr int kThreads = 256;
// Enough blocks to fill any GPU several times over; beyond it, a block loops.
constexpr int64_t kMaxBlocks = 16384;

GDBP_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many of `width` neighbours from `first` on come before `end`.
template <int width>
__device__ __forceinline__ int neighbours(int64_t first, int64_t end) {
  const int64_t left = end - first;
  return left >= width ? width : left > 0 ? int(left) : 0;
}

// Whether there is nothing to do after all: op.idle(), where an op has it.
template <class Op>
__device__ __forceinline__ auto is_idle(const Op& op, int) -> decltype(op.idle()) {
  return op.idle();
}
template <class Op>
__device__ __forceinline__ bool is_idle(const Op&, long) {
  return false;
}

// `op(begin, count)` handles the elements [begin, begin + count), count <= op.width.
template <class Op>
__global__ void __launch_bounds__(kThreads) map_kernel(int64_t n, Op op) {
  if (is_idle(op, 0)) return;
  const int64_t stride = int64_t(gridDim.x) * kThreads * Op::width;
  int64_t begin = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * Op::width;
  for (; begin < n; begin += stride) op(begin, neighbours<Op::width>(begin, n));
}

// Of a kernel that may find nothing to do: to start many blocks would then be all its cost. A large GPU has room for
// them at once.
constexpr int64_t kFewBlocks = 1024;

template <class Op>
int map(int64_t n, const Op& op, void* stream, int64_t most_blocks = kMaxBlocks) {
  if (n == 0) return 0;
  const int64_t blocks = ceil_div(n, kThreads * Op::width);
  const unsigned grid = unsigned(blocks < most_blocks ? blocks : most_blocks);
  return GDBP_LAUNCH(map_kernel<Op>, grid, kThreads, 0, stream, n, op);
}

}  // namespace gdbp::cuda
