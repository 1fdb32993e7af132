// Sums and maxima over the threads of a warp or a block, in a fixed tree: no atomics, so the same input
// gives the same bits in every run.
#pragma once
#include <math.h>

#include "common/launch.h"
#include "common/map_cuda.cuh"

namespace gdbp::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Min {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
// The larger number; a NaN gives way.
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b || b != b ? a : b;
  }
  __device__ __forceinline__ float operator()(float a, float b) const { return ::fmaxf(a, b); }
};

// Every lane gets the result: with an exchange in pairs all lanes add the same numbers in the same tree.
template <class Op, class T>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = op(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// The same over a block of `threads` (a multiple of a warp, at most 1024). The barrier in front lets
// calls follow one another: no thread overwrites a partial that another is still reading.
template <int threads, class Op, class T>
__device__ __forceinline__ T block_reduce(T value, Op op, T identity) {
  constexpr int warps = threads / kWarp;
  static_assert(threads % kWarp == 0 && warps <= kWarp);
  __shared__ T partial[warps];
  const int lane = int(threadIdx.x) % kWarp;
  value = warp_reduce(value, op);
  __syncthreads();
  if (lane == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_reduce(lane < warps ? partial[lane] : identity, op);
}

// The threads that share one row: a whole block, one warp of it where rows are short, or a single thread.
template <int threads>
struct Team {
  static constexpr int size = threads;
  static constexpr int block = threads > kThreads ? threads : kThreads;
  static constexpr int per_block = block / threads;
  static_assert(per_block == 1 || threads == kWarp || threads == 1);

  __device__ __forceinline__ static int rank() { return int(threadIdx.x) % threads; }
  __device__ __forceinline__ static int64_t row() { return int64_t(blockIdx.x) * per_block + threadIdx.x / threads; }
  __device__ __forceinline__ static void sync() {
    if constexpr (threads == kWarp) {
      __syncwarp();
    } else if constexpr (per_block == 1) {
      __syncthreads();
    }
  }
  template <class Op, class T>
  __device__ __forceinline__ static T reduce(T value, Op op, T identity) {
    if constexpr (threads == 1) {
      return value;
    } else if constexpr (threads == kWarp) {
      return warp_reduce(value, op);
    } else {
      return block_reduce<threads>(value, op, identity);
    }
  }
};

}  // namespace gdbp::cuda
