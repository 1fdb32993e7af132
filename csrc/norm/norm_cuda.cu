// Batch normalisation on CUDA; of short columns in one launch (slab_cuda.cuh), else in tiles. A thread keeps to a few
// neighbouring columns and walks down the rows; a block adds up one tile, in a fixed tree, and a second kernel the
// tiles of each channel, in order. No atomics.
#include "common/activations_cuda.cuh"
#include "common/reduce_cuda.cuh"
#include "norm/norm.h"
#include "norm/slab_cuda.cuh"

namespace gdbp::norm {
namespace {

using cuda::kThreads;

// blockIdx.y and z loop where the hardware's limit is below the need.
constexpr int64_t kMaxGrid = 65535;
unsigned at_most_grid(int64_t n) { return unsigned(n < kMaxGrid ? n : kMaxGrid); }

// kThreads threads as (columns, rows): as many groups of columns as there are, up to `most`, rounded up to a power
// of two; the other threads take other rows.
dim3 block_of(int64_t groups, int most) {
  int x = 1;
  while (x < groups && x < most) x *= 2;
  return dim3(unsigned(x), unsigned(kThreads / x));
}

// Per channel, one array after another.
template <class C>
struct Coefficients {
  C *center, *scale, *shift, *slope, *offset;

  Coefficients(void* memory, int64_t channels)
      : center(static_cast<C*>(memory)),
        scale(center + channels),
        shift(scale + channels),
        slope(shift + channels),
        offset(slope + channels) {}
};

// A thread's columns of one coefficient: neighbours where a column is a channel, else all the same.
template <int n, class C>
__device__ __forceinline__ void load_coefficient(const C* values, bool by_column, int64_t channel, int count,
                                                 C (&to)[n]) {
#pragma unroll
  for (int k = 0; k < n; ++k) to[k] = k < count ? values[by_column ? channel + k : channel] : C(0);
}

// What a block adds up: a channel's numbers, where a column is a channel over threadIdx.y only, else over all
// threads. Thread (x, 0), or thread 0, gets the result. The barrier in front lets calls follow one another.
template <class Value>
__device__ __forceinline__ Value reduce_block(Value value, bool by_column) {
  // As numbers: shared memory runs no constructors.
  __shared__ double memory[kThreads * sizeof(Value) / sizeof(double)];
  Value* const partial = reinterpret_cast<Value*>(memory);
  const int thread = int(threadIdx.y * blockDim.x + threadIdx.x);
  const int lowest = by_column ? int(blockDim.x) : 1;
  __syncthreads();
  partial[thread] = value;
  for (int distance = kThreads / 2; distance >= lowest; distance /= 2) {
    __syncthreads();
    if (thread < distance) partial[thread] = value = value + partial[thread + distance];
  }
  return value;
}

struct Set : Moments {
  __device__ __forceinline__ Set operator+(const Set& other) const { return {merge(*this, other)}; }
};
struct Products {
  double gradients, products;
  __device__ __forceinline__ Products operator+(const Products& other) const {
    return {gradients + other.gradients, products + other.products};
  }
};

// Visits a block's tile: visit(from, col, count, channel) gets the place of a thread's first element, and its
// columns; then done(channel, k) is called by all threads alike for each channel that the tile holds.
struct Tile {
  int64_t first_row, end_row, first_col, end_col, index;
};
template <int width>
__device__ __forceinline__ Tile tile_of(const Planes& p, int64_t column_block) {
  const int64_t row = int64_t(blockIdx.x) * kRowTile;
  const int64_t across = p.by_column ? int64_t(blockDim.x) * width : kColumnTile;
  const int64_t col = column_block * across;
  return {row, row + kRowTile < p.rows ? row + kRowTile : p.rows, col, col + across < p.cols ? col + across : p.cols,
          p.by_column ? int64_t(blockIdx.x) : blockIdx.x * p.column_tiles() + column_block};
}

// Sums of each tile: a thread's few rows in float (double for float64) about their own first element, then in
// double.
template <class T>
__global__ void __launch_bounds__(kThreads)
    collect_kernel(Planes p, int64_t channels, int64_t column_blocks, const T* input, double* means, double* squares,
                   bool vectors) {
  using C = Compute<T>;
  constexpr int width = cuda::kWidth<T>;
  for (int64_t plane = blockIdx.z; plane < p.count; plane += gridDim.z) {
    for (int64_t column_block = blockIdx.y; column_block < column_blocks; column_block += gridDim.y) {
      const Tile tile = tile_of<width>(p, column_block);
      Set whole{};
      // Where a column is a channel this is one step, else the steps across the tile.
      for (int64_t left = tile.first_col; left < tile.end_col; left += int64_t(blockDim.x) * width) {
        const int64_t col = left + int64_t(threadIdx.x) * width;
        const int count = cuda::neighbours<width>(col, tile.end_col);
        const T* const x = input + plane * p.plane_step + col;
        C pivot[width] = {}, sum[width] = {}, sum_of_squares[width] = {};
        int64_t row = tile.first_row + threadIdx.y;
        const int64_t rows = row < tile.end_row ? (tile.end_row - row + blockDim.y - 1) / blockDim.y : 0;
        if (rows > 0) cuda::load(x + row * p.row_step, count, vectors, pivot);
        for (; row < tile.end_row; row += blockDim.y) {
          C value[width];
          cuda::load(x + row * p.row_step, count, vectors, value);
#pragma unroll
          for (int k = 0; k < width; ++k) {
            const C d = value[k] - pivot[k];
            sum[k] += d;
            sum_of_squares[k] += d * d;
          }
        }
#pragma unroll
        for (int k = 0; k < width; ++k) {
          const bool any = rows > 0 && k < count;
          Set own{};
          if (any) own = {Moments::about(double(pivot[k]), double(rows), double(sum[k]), double(sum_of_squares[k]))};
          if (!p.by_column) {
            whole = whole + own;
            continue;
          }
          const Set all = reduce_block(own, true);
          if (threadIdx.y == 0 && k < count) {
            means[tile.index * channels + col + k] = all.mean;
            squares[tile.index * channels + col + k] = all.squares;
          }
        }
      }
      if (p.by_column) continue;
      const Set all = reduce_block(whole, false);
      if (threadIdx.x == 0 && threadIdx.y == 0) {
        means[tile.index * channels + plane] = all.mean;
        squares[tile.index * channels + plane] = all.squares;
      }
    }
  }
}

// Statistics of each channel from its tiles, where they are to be computed, and the coefficients of its elements.
template <class C>
__global__ void __launch_bounds__(kThreads)
    coefficients_kernel(Planes p, int64_t channels, bool from_tiles, const double* means, const double* squares,
                        double* stats, const C* weight, const C* bias, double eps, Coefficients<C> to) {
  const int64_t channel = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (from_tiles) {
    Set set{};
    if (channel < channels) {
      for (int64_t tile = threadIdx.y; tile < p.tiles(); tile += blockDim.y) {
        const int64_t at = tile * channels + channel;
        set = set + Set{{p.elements(tile), means[at], squares[at]}};
      }
    }
    set = reduce_block(set, true);
    if (threadIdx.y == 0 && channel < channels) {
      stats[channel] = set.mean;
      stats[channels + channel] = set.squares / set.count;
    }
  }
  if (threadIdx.y != 0 || channel >= channels) return;
  const auto normalize =
      Normalize<C>::of(stats[channel], stats[channels + channel], eps, weight != nullptr ? double(weight[channel]) : 1,
                       bias != nullptr ? double(bias[channel]) : 0);
  to.center[channel] = normalize.center;
  to.scale[channel] = normalize.scale;
  to.shift[channel] = normalize.shift;
}

template <class T, class Op>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(Planes p, const T* input, Coefficients<Compute<T>> by, T* output, bool vectors) {
  using C = Compute<T>;
  constexpr int width = cuda::kWidth<T>;
  for (int64_t plane = blockIdx.z; plane < p.count; plane += gridDim.z) {
    for (int64_t col = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * width; col < p.cols;
         col += int64_t(gridDim.y) * blockDim.x * width) {
      const int count = cuda::neighbours<width>(col, p.cols);
      const int64_t channel = p.by_column ? col : plane;
      C center[width], scale[width], shift[width];
      load_coefficient(by.center, p.by_column, channel, count, center);
      load_coefficient(by.scale, p.by_column, channel, count, scale);
      load_coefficient(by.shift, p.by_column, channel, count, shift);
      int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
      for (; row < p.rows; row += int64_t(gridDim.x) * blockDim.y) {
        const int64_t at = plane * p.plane_step + row * p.row_step + col;
        C x[width];
        cuda::load(input + at, count, vectors, x);
#pragma unroll
        for (int k = 0; k < width; ++k) x[k] = Op::forward(Normalize<C>{center[k], scale[k], shift[k]}(x[k]));
        cuda::store(output + at, count, vectors, x);
      }
    }
  }
}

template <class T, class Op>
__global__ void __launch_bounds__(kThreads)
    products_kernel(Planes p, int64_t channels, int64_t column_blocks, const T* grad_output, const T* input,
                    Coefficients<Compute<T>> by, double* gradients, double* products, bool vectors) {
  using C = Compute<T>;
  constexpr int width = cuda::kWidth<T>;
  for (int64_t plane = blockIdx.z; plane < p.count; plane += gridDim.z) {
    for (int64_t column_block = blockIdx.y; column_block < column_blocks; column_block += gridDim.y) {
      const Tile tile = tile_of<width>(p, column_block);
      Products whole{};
      for (int64_t left = tile.first_col; left < tile.end_col; left += int64_t(blockDim.x) * width) {
        const int64_t col = left + int64_t(threadIdx.x) * width;
        const int count = cuda::neighbours<width>(col, tile.end_col);
        const int64_t channel = p.by_column ? col : plane;
        C center[width], scale[width], shift[width], sum[width] = {}, product[width] = {};
        load_coefficient(by.center, p.by_column, channel, count, center);
        load_coefficient(by.scale, p.by_column, channel, count, scale);
        load_coefficient(by.shift, p.by_column, channel, count, shift);
        for (int64_t row = tile.first_row + threadIdx.y; row < tile.end_row && count > 0; row += blockDim.y) {
          const int64_t at = plane * p.plane_step + row * p.row_step + col;
          C g[width], x[width];
          cuda::load(grad_output + at, count, vectors, g);
          cuda::load(input + at, count, vectors, x);
#pragma unroll
          for (int k = 0; k < width; ++k) {
            const C z = Normalize<C>{center[k], scale[k], shift[k]}(x[k]);
            const C grad = backward_from_pre<Op>(g[k], z);
            sum[k] += grad;
            product[k] += grad * (x[k] - center[k]);
          }
        }
#pragma unroll
        for (int k = 0; k < width; ++k) {
          const Products own = k < count ? Products{double(sum[k]), double(product[k])} : Products{};
          if (!p.by_column) {
            whole = whole + own;
            continue;
          }
          const Products all = reduce_block(own, true);
          if (threadIdx.y == 0 && k < count) {
            gradients[tile.index * channels + col + k] = all.gradients;
            products[tile.index * channels + col + k] = all.products;
          }
        }
      }
      if (p.by_column) continue;
      const Products all = reduce_block(whole, false);
      if (threadIdx.x == 0 && threadIdx.y == 0) {
        gradients[tile.index * channels + plane] = all.gradients;
        products[tile.index * channels + plane] = all.products;
      }
    }
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    gradients_kernel(Planes p, int64_t channels, bool of_batch, double count, const double* gradients,
                     const double* products, const double* stats, const C* weight, double eps, C* grad_weight,
                     C* grad_bias, Coefficients<C> to) {
  const int64_t channel = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  Products sums{};
  if (channel < channels) {
    for (int64_t tile = threadIdx.y; tile < p.tiles(); tile += blockDim.y) {
      sums = sums + Products{gradients[tile * channels + channel], products[tile * channels + channel]};
    }
  }
  sums = reduce_block(sums, true);
  if (threadIdx.y != 0 || channel >= channels) return;
  const auto grads =
      Gradients<C>::of(stats[channel], stats[channels + channel], eps, weight != nullptr ? double(weight[channel]) : 1,
                       count, sums.gradients, sums.products, of_batch);
  if (grad_weight != nullptr) grad_weight[channel] = count > 0 ? grads.weight : C(0);
  if (grad_bias != nullptr) grad_bias[channel] = grads.bias;
  to.slope[channel] = grads.slope;
  to.offset[channel] = grads.offset;
}

// `through_statistics`: whether slope and offset are there, else they are 0.
template <class T, class Op>
__global__ void __launch_bounds__(kThreads)
    apply_gradients_kernel(Planes p, const T* grad_output, const T* input, Coefficients<Compute<T>> by,
                           bool through_statistics, T* grad_input, bool vectors) {
  using C = Compute<T>;
  constexpr int width = cuda::kWidth<T>;
  for (int64_t plane = blockIdx.z; plane < p.count; plane += gridDim.z) {
    for (int64_t col = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * width; col < p.cols;
         col += int64_t(gridDim.y) * blockDim.x * width) {
      const int count = cuda::neighbours<width>(col, p.cols);
      const int64_t channel = p.by_column ? col : plane;
      C center[width], scale[width], shift[width], slope[width] = {}, offset[width] = {};
      load_coefficient(by.center, p.by_column, channel, count, center);
      load_coefficient(by.scale, p.by_column, channel, count, scale);
      load_coefficient(by.shift, p.by_column, channel, count, shift);
      if (through_statistics) {
        load_coefficient(by.slope, p.by_column, channel, count, slope);
        load_coefficient(by.offset, p.by_column, channel, count, offset);
      }
      int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
      for (; row < p.rows; row += int64_t(gridDim.x) * blockDim.y) {
        const int64_t at = plane * p.plane_step + row * p.row_step + col;
        C g[width], x[width];
        cuda::load(grad_output + at, count, vectors, g);
        cuda::load(input + at, count, vectors, x);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          const C z = Normalize<C>{center[k], scale[k], shift[k]}(x[k]);
          const C grad = backward_from_pre<Op>(g[k], z);
          g[k] = input_gradient(grad, x[k], center[k], scale[k], slope[k], offset[k]);
        }
        cuda::store(grad_input + at, count, vectors, g);
      }
    }
  }
}

// One block, so that all threads have read the number of batches before it changes.
template <class T>
__global__ void __launch_bounds__(kThreads) update_kernel(Update a) {
  const double batches = a.batches != nullptr ? double(*a.batches + 1) : 0;
  __syncthreads();
  if (threadIdx.x == 0 && a.batches != nullptr) *a.batches += 1;
  if (a.elements == 0) return;
  const double momentum = a.cumulative ? 1 / batches : a.momentum;
  T *const mean = static_cast<T*>(a.running_mean), *const variance = static_cast<T*>(a.running_var);
  const T* const offset = static_cast<const T*>(a.offset);
  for (int64_t c = threadIdx.x; c < a.channels; c += kThreads) {
    const double batch_mean = a.stats[c] + (offset != nullptr ? double(widen(offset[c])) : 0);
    const double batch_var = a.stats[a.channels + c] * (a.elements / (a.elements - 1));
    mean[c] = narrow<T>(Compute<T>(moving_average(double(widen(mean[c])), batch_mean, momentum)));
    variance[c] = narrow<T>(Compute<T>(moving_average(double(widen(variance[c])), batch_var, momentum)));
  }
}

// ---- launches ----

// How the passes over the elements, and those over the channels, are cut into blocks.
template <class T>
struct Launch {
  static constexpr int width = cuda::kWidth<T>;
  Planes planes;
  int64_t channels, column_blocks;  // of the kernels that add up tiles
  dim3 tile_grid, tile_block, map_grid, map_block, channel_grid;
  dim3 channel_block = dim3(32, kThreads / 32);
  double *first, *second;
  Coefficients<Compute<T>> coefficients;

  Launch(const Shape& shape, void* workspace)
      : planes(shape),
        channels(shape.channels),
        first(static_cast<double*>(workspace)),
        second(first + planes.tiles() * channels),
        coefficients(second + planes.tiles() * channels, channels) {
    const int64_t groups = cuda::ceil_div(planes.cols, width);
    // At most 32 across, so that 8 rows of a tile are in flight.
    tile_block = block_of(groups, 32);
    column_blocks = planes.by_column ? cuda::ceil_div(groups, tile_block.x) : planes.column_tiles();
    tile_grid = dim3(unsigned(planes.row_tiles()), at_most_grid(column_blocks), at_most_grid(planes.count));
    map_block = block_of(groups, kThreads);
    const int64_t across = cuda::ceil_div(groups, map_block.x), down = cuda::ceil_div(planes.rows, map_block.y);
    // Without elements nothing is launched over them, but their gradients of weight and bias still are.
    const int64_t others = across * planes.count > 0 ? across * planes.count : 1;
    const int64_t most = cuda::ceil_div(cuda::kMaxBlocks, others);
    map_grid = dim3(unsigned(down < most ? down : most), at_most_grid(across), at_most_grid(planes.count));
    channel_grid = dim3(unsigned(cuda::ceil_div(channels, 32)));
  }
  // Whether every row starts where a vector may.
  template <class... Pointers>
  bool vectors(Pointers... pointers) const {
    return planes.row_step % width == 0 && planes.plane_step % width == 0 && (cuda::aligned(pointers) && ...);
  }
};

template <class T>
int forward(const Forward& a, void* stream) {
  using C = Compute<T>;
  const Launch<T> l(a.shape, a.workspace);
  const T* const input = static_cast<const T*>(a.input);
  T* const output = static_cast<T*>(a.output);
  const bool vectors = l.vectors(a.input, a.output);
  if (a.of_batch && suits_slabs(l.planes)) {
    return dispatch(a.activation, [&](auto op) {
      const auto kernel = slab_forward_kernel<T, cuda::ActivationIn<T, decltype(op)>>;
      return GDBP_LAUNCH(kernel, slabs_of<T>(l.planes), kSlabThreads, 0, stream, l.planes.rows, l.planes.cols, input,
                         static_cast<const C*>(a.weight), static_cast<const C*>(a.bias), a.eps, a.stats, output,
                         vectors);
    });
  }
  if (a.of_batch) {
    const int error = GDBP_LAUNCH(collect_kernel<T>, l.tile_grid, l.tile_block, 0, stream, l.planes, l.channels,
                                  l.column_blocks, input, l.first, l.second, vectors);
    if (error != 0) return error;
  }
  const int error = GDBP_LAUNCH(coefficients_kernel<C>, l.channel_grid, l.channel_block, 0, stream, l.planes,
                                l.channels, a.of_batch, l.first, l.second, a.stats, static_cast<const C*>(a.weight),
                                static_cast<const C*>(a.bias), a.eps, l.coefficients);
  if (error != 0) return error;
  return dispatch(a.activation, [&](auto op) {
    const auto kernel = apply_kernel<T, cuda::ActivationIn<T, decltype(op)>>;
    return GDBP_LAUNCH(kernel, l.map_grid, l.map_block, 0, stream, l.planes, input, l.coefficients, output, vectors);
  });
}

template <class T>
int backward(const Backward& a, void* stream) {
  using C = Compute<T>;
  const Launch<T> l(a.shape, a.workspace);
  const T *const g = static_cast<const T*>(a.grad_output), *const x = static_cast<const T*>(a.input);
  const C* const weight = static_cast<const C*>(a.weight);
  const bool empty = l.planes.tiles() == 0, sums = a.of_batch || a.grad_weight != nullptr || a.grad_bias != nullptr;
  const bool vectors = l.vectors(a.grad_output, a.input);
  if (sums && suits_slabs(l.planes)) {
    return dispatch(a.activation, [&](auto op) {
      const auto kernel = slab_backward_kernel<T, cuda::ActivationIn<T, decltype(op)>>;
      return GDBP_LAUNCH(kernel, slabs_of<T>(l.planes), kSlabThreads, 0, stream, l.planes.rows, l.planes.cols, g, x,
                         weight, static_cast<const C*>(a.bias), a.stats, a.eps, a.of_batch,
                         static_cast<T*>(a.grad_input), static_cast<C*>(a.grad_weight), static_cast<C*>(a.grad_bias),
                         vectors && cuda::aligned(a.grad_input));
    });
  }
  const int error = GDBP_LAUNCH(coefficients_kernel<C>, l.channel_grid, l.channel_block, 0, stream, l.planes,
                                l.channels, false, l.first, l.second, const_cast<double*>(a.stats), weight,
                                static_cast<const C*>(a.bias), a.eps, l.coefficients);
  if (error != 0) return error;
  return dispatch(a.activation, [&](auto op) {
    using Op = cuda::ActivationIn<T, decltype(op)>;
    if (sums && !empty) {
      const auto kernel = products_kernel<T, Op>;
      const int error = GDBP_LAUNCH(kernel, l.tile_grid, l.tile_block, 0, stream, l.planes, l.channels, l.column_blocks,
                                    g, x, l.coefficients, l.first, l.second, vectors);
      if (error != 0) return error;
    }
    if (sums) {
      const double count = l.planes.elements();
      const int error = GDBP_LAUNCH(gradients_kernel<C>, l.channel_grid, l.channel_block, 0, stream, l.planes,
                                    l.channels, a.of_batch, count, l.first, l.second, a.stats, weight, a.eps,
                                    static_cast<C*>(a.grad_weight), static_cast<C*>(a.grad_bias), l.coefficients);
      if (error != 0) return error;
    }
    if (a.grad_input == nullptr || empty) return 0;
    const auto kernel = apply_gradients_kernel<T, Op>;
    return GDBP_LAUNCH(kernel, l.map_grid, l.map_block, 0, stream, l.planes, g, x, l.coefficients, sums,
                       static_cast<T*>(a.grad_input), vectors && cuda::aligned(a.grad_input));
  });
}

}  // namespace

int forward_cuda(const Forward& a, void* stream) {
  if (a.shape.batch == 0 || a.shape.channels == 0 || a.shape.length == 0) return 0;
  return dispatch(a.shape.dtype, [&](auto type) { return forward<typename decltype(type)::type>(a, stream); });
}

int backward_cuda(const Backward& a, void* stream) {
  if (a.shape.channels == 0) return 0;
  return dispatch(a.shape.dtype, [&](auto type) { return backward<typename decltype(type)::type>(a, stream); });
}

int update_cuda(const Update& a, void* stream) {
  return dispatch(a.dtype, [&](auto type) {
    return GDBP_LAUNCH(update_kernel<typename decltype(type)::type>, 1, kThreads, 0, stream, a);
  });
}

}  // namespace gdbp::norm
