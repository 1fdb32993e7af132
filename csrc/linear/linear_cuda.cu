// Everything around the matrix product on CUDA. A thread keeps to a few neighbouring columns and walks
// down the rows, so the bias is read once and no index is ever divided.
#include "common/activations_cuda.cuh"
#include "common/reduce_cuda.cuh"
#include "linear/linear.h"

namespace gdbp::linear {
namespace {

using cuda::kThreads;

// kThreads threads as (columns, rows): as many column groups as the matrix has, up to `most`, rounded
// up to a power of two; the other threads take other rows.
struct Shape {
  dim3 block;
  int64_t column_blocks;
};

template <int width>
Shape shape_of(int64_t cols, int most) {
  const int64_t groups = cuda::ceil_div(cols, width);
  int x = 1;
  while (x < groups && x < most) x *= 2;
  return {dim3(unsigned(x), unsigned(kThreads / x)), cuda::ceil_div(groups, x)};
}

// blockIdx.y counts blocks of columns, and loops where the hardware's limit is below the need.
constexpr int64_t kMaxGridY = 65535;
unsigned grid_y(int64_t column_blocks) { return unsigned(column_blocks < kMaxGridY ? column_blocks : kMaxGridY); }

template <int width>
__device__ __forceinline__ int64_t first_column() {
  return (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * width;
}
template <int width>
__device__ __forceinline__ int64_t column_stride() {
  return int64_t(gridDim.y) * blockDim.x * width;
}
template <class T, class Op>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(int64_t rows, int64_t cols, T* pre, const T* GDBP_RESTRICT bias, T* output, bool vectors) {
  using C = Compute<T>;
  constexpr int width = cuda::kWidth<T>;
  for (int64_t col = first_column<width>(); col < cols; col += column_stride<width>()) {
    const int count = cuda::neighbours<width>(col, cols);
    C shift[width] = {};
    if (bias != nullptr) cuda::load(bias + col, count, vectors, shift);
    int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    for (; row < rows; row += int64_t(gridDim.x) * blockDim.y) {
      const int64_t at = row * cols + col;
      C z[width];
      cuda::load(pre + at, count, vectors, z);
#pragma unroll
      for (int k = 0; k < width; ++k) z[k] += shift[k];
      if (pre != output) cuda::store(pre + at, count, vectors, z);
#pragma unroll
      for (int k = 0; k < width; ++k) z[k] = Op::forward(z[k]);
      cuda::store(output + at, count, vectors, z);
    }
  }
}

// Adds up `value` over threadIdx.y, for each column of each thread; the sum is threadIdx.y 0's.
template <class C, int width>
__device__ __forceinline__ void sum_over_rows(C (&value)[width]) {
  __shared__ C partial[width][kThreads];
  const int thread = int(threadIdx.y * blockDim.x + threadIdx.x);
  __syncthreads();
#pragma unroll
  for (int k = 0; k < width; ++k) partial[k][thread] = value[k];
  for (int distance = int(blockDim.y) / 2; distance > 0; distance /= 2) {
    __syncthreads();
    if (int(threadIdx.y) < distance) {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        partial[k][thread] = value[k] += partial[k][thread + distance * int(blockDim.x)];
      }
    }
  }
}

// One block per tile of rows: the gradient of the pre-activation, and its sum over the tile. The loop
// over columns runs on block indices, so that a whole block meets at the barriers.
template <class T, class Op>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(int64_t rows, int64_t cols, const T* grad_output, const T* saved, T* grad_pre,
                    Compute<T>* tile_sums, bool vectors) {
  using C = Compute<T>;
  constexpr int width = cuda::kWidth<T>;
  const int64_t tile = blockIdx.x;
  const int64_t end = (tile + 1) * kRowTile < rows ? (tile + 1) * kRowTile : rows;
  for (int64_t left = first_column<width>() - int64_t(threadIdx.x) * width; left < cols;
       left += column_stride<width>()) {
    const int64_t col = left + int64_t(threadIdx.x) * width;
    const int count = cuda::neighbours<width>(col, cols);
    C sum[width] = {};
    for (int64_t row = tile * kRowTile + threadIdx.y; row < end && count > 0; row += blockDim.y) {
      const int64_t at = row * cols + col;
      C g[width], s[width] = {};
      cuda::load(grad_output + at, count, vectors, g);
      if constexpr (Op::saves != Saved::nothing) cuda::load(saved + at, count, vectors, s);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        g[k] = Op::backward(g[k], s[k]);
        sum[k] += g[k];
      }
      if (grad_pre != nullptr) cuda::store(grad_pre + at, count, vectors, g);
    }
    if (tile_sums == nullptr) continue;
    sum_over_rows(sum);
    if (threadIdx.y == 0 && count > 0) cuda::store(tile_sums + tile * cols + col, count, false, sum);
  }
}

// The second stage: the sums of the tiles, one block per group of columns.
template <class T>
__global__ void __launch_bounds__(kThreads)
    bias_kernel(int64_t tiles, int64_t cols, const Compute<T>* GDBP_RESTRICT tile_sums, T* grad_bias) {
  using C = Compute<T>;
  const int64_t col = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  C sum[1] = {};
  if (col < cols) {
    for (int64_t tile = threadIdx.y; tile < tiles; tile += blockDim.y) sum[0] += tile_sums[tile * cols + col];
  }
  sum_over_rows(sum);
  if (threadIdx.y == 0 && col < cols) grad_bias[col] = cuda::narrow_fast<T>(sum[0]);
}

template <class T>
int backward(const Backward& args, void* stream) {
  using C = Compute<T>;
  constexpr int width = cuda::kWidth<T>;
  C* const tile_sums = args.grad_bias != nullptr ? static_cast<C*>(args.workspace) : nullptr;
  const int64_t tiles = cuda::ceil_div(args.rows, kRowTile);
  const bool vectors = args.cols % width == 0 && cuda::aligned(args.grad_output) && cuda::aligned(args.saved) &&
                       cuda::aligned(args.grad_pre);
  if (tiles > 0 && (tile_sums != nullptr || args.grad_pre != nullptr)) {
    // At most 32 column groups across, so that at least 8 rows of a tile are in flight.
    const Shape shape = shape_of<width>(args.cols, 32);
    const int error = dispatch(args.activation, [&](auto op) {
      const auto kernel = backward_kernel<T, cuda::ActivationIn<T, decltype(op)>>;
      return GDBP_LAUNCH(kernel, dim3(unsigned(tiles), grid_y(shape.column_blocks)), shape.block, 0, stream, args.rows,
                         args.cols, static_cast<const T*>(args.grad_output), static_cast<const T*>(args.saved),
                         static_cast<T*>(args.grad_pre), tile_sums, vectors);
    });
    if (error != 0) return error;
  }
  if (args.grad_bias == nullptr) return 0;
  const Shape shape = shape_of<1>(args.cols, 32);
  return GDBP_LAUNCH(bias_kernel<T>, unsigned(shape.column_blocks), shape.block, 0, stream, tiles, args.cols, tile_sums,
                     static_cast<T*>(args.grad_bias));
}

}  // namespace

int forward_cuda(const Forward& args, void* stream) {
  if (args.rows == 0 || args.cols == 0) return 0;
  return gdbp::dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int width = cuda::kWidth<T>;
    const bool vectors =
        args.cols % width == 0 && cuda::aligned(args.pre) && cuda::aligned(args.bias) && cuda::aligned(args.output);
    const Shape shape = shape_of<width>(args.cols, kThreads);
    const int64_t row_blocks = cuda::ceil_div(args.rows, shape.block.y);
    const int64_t most = cuda::ceil_div(cuda::kMaxBlocks, shape.column_blocks);
    const dim3 grid(unsigned(row_blocks < most ? row_blocks : most), grid_y(shape.column_blocks));
    return dispatch(args.activation, [&](auto op) {
      const auto kernel = forward_kernel<T, cuda::ActivationIn<T, decltype(op)>>;
      return GDBP_LAUNCH(kernel, grid, shape.block, 0, stream, args.rows, args.cols, static_cast<T*>(args.pre),
                         static_cast<const T*>(args.bias), static_cast<T*>(args.output), vectors);
    });
  });
}

int backward_cuda(const Backward& args, void* stream) {
  if (args.cols == 0) return 0;
  return gdbp::dispatch(args.dtype, [&](auto tag) { return backward<typename decltype(tag)::type>(args, stream); });
}

}  // namespace gdbp::linear
