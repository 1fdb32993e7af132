// Batch normalisation in two launches: one adds up tiles, and each block of the other adds up the tiles of just those
// channels that it goes on to write. All of these do so in the same order, and get the same bits.
#pragma once
#include "norm/columns_cuda.cuh"

namespace gdbp::norm {
namespace {

using cuda::kThreads;

// Of a matrix a block's columns take 128 bytes of a row, so that few blocks add up the same tiles.
constexpr int kAcross = 8;

// What a block treats at once, in turn over blockIdx.z: of a matrix some columns, each a channel, else a plane.
template <int width>
struct Part {
  int64_t channel, begin, end, start;  // its first one; its columns; the plane's first element
  int channels;
  int64_t across = int64_t(blockDim.x) * width;  // columns of a block's step
  bool by_column;

  // One channel, without columns.
  __device__ __forceinline__ explicit Part(int64_t channel)
      : channel(channel), begin(0), end(0), start(0), channels(1), by_column(false) {}
  __device__ __forceinline__ Part(const Planes& p, int64_t index) : by_column(p.by_column) {
    channel = by_column ? index * across : index;
    begin = by_column ? channel : 0;
    end = by_column && begin + across < p.cols ? begin + across : p.cols;
    start = by_column ? 0 : index * p.plane_step;
    channels = by_column ? int(end - begin) : 1;
  }
  template <int n, class V, class F>
  __device__ __forceinline__ void for_sums(const V (&own)[n][width], const F& f) const {
    norm::for_sums<kThreads, kAcross>(own, channels, by_column, f);
  }
};
template <int width, class F>
__device__ __forceinline__ void for_parts(const Planes& p, const F& f) {
  const int64_t across = int64_t(blockDim.x) * width, parts = p.by_column ? (p.cols + across - 1) / across : p.count;
  for (int64_t index = blockIdx.z; index < parts; index += gridDim.z) f(Part<width>(p, index));
}

// One of the part's tiles, those of blockIdx.x's rows in turn over blockIdx.y.
template <class T>
struct Tile {
  static constexpr int width = cuda::kWidth<T>;
  int64_t index, begin, end;  // among the channel's; its columns
  const Planes& p;
  const Part<width>& part;
  bool vectors;

  // visit(rows, at) for a thread's rows: `at`: its first element.
  template <class F>
  __device__ __forceinline__ void for_elements(const F& visit) const {
    const int64_t first = int64_t(blockIdx.x) * p.row_tile;
    const int64_t last = first + p.row_tile < p.rows ? first + p.row_tile : p.rows;
    for (int64_t col = begin + int64_t(threadIdx.x) * width; col < end; col += part.across) {
      const int count = cuda::neighbours<width>(col, end);
      for (int64_t row = first + threadIdx.y; row < last; row += kUnroll<T> * int64_t(blockDim.y))
        visit(Rows<T>(row, blockDim.y, last, p.row_step, count, vectors), part.start + row * p.row_step + col);
    }
  }
};
template <class T, class F>
__device__ __forceinline__ void for_tiles(const Planes& p, const Part<cuda::kWidth<T>>& part, bool vectors,
                                          const F& f) {
  const int64_t tiles = p.by_column ? 1 : p.column_tiles();
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const int64_t begin = part.begin + tile * kColumnTile;
    const int64_t end = begin + kColumnTile < part.end ? begin + kColumnTile : part.end;
    f(Tile<T>{blockIdx.x * tiles + tile, begin, end, p, part, vectors});
  }
}

// visit(rows, at) for the part's elements that are this block's, in strides of the grid.
template <class T, class F>
__device__ __forceinline__ void for_elements(const Planes& p, const Part<cuda::kWidth<T>>& part, bool vectors,
                                             const F& visit) {
  constexpr int width = cuda::kWidth<T>;
  const int64_t stride = int64_t(gridDim.x) * blockDim.y;
  int64_t col = part.begin + blockIdx.y * part.across + int64_t(threadIdx.x) * width;
  for (; col < part.end; col += gridDim.y * part.across) {
    const int count = cuda::neighbours<width>(col, part.end);
    for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < p.rows; row += kUnroll<T> * stride)
      visit(Rows<T>(row, stride, p.rows, p.row_step, count, vectors), part.start + row * p.row_step + col);
  }
}

// Two numbers of each tile and channel: mean and sum of squared deviations, or two sums.
struct Tiles {
  double *first, *second;
  int64_t channels, count;  // count: of each channel's tiles that are to be added up

  __device__ __forceinline__ void keep(int64_t tile, int64_t channel, double a, double b) const {
    first[tile * channels + channel] = a;
    second[tile * channels + channel] = b;
  }
};

// f(column, sums) for each of the part's channels, as of for_sums: `of_moments`: of the elements' differences from the
// first tile's mean and of their squares; else of the tiles' numbers. Without tiles 0.
template <bool of_moments, int width, class F>
__device__ __forceinline__ void for_sums_of_tiles(const Planes& p, const Tiles& tiles, const Part<width>& part,
                                                  const F& f) {
  double own[2][width] = {};
  const int64_t channel = part.channel + (part.by_column ? int64_t(threadIdx.x) * width : 0);
  const int count = cuda::neighbours<width>(channel, part.channel + part.channels);
  const int step = part.by_column ? int(blockDim.y) : kThreads;
  int64_t tile = count == 0 ? tiles.count : part.by_column ? threadIdx.y : threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll 2
  for (; tile < tiles.count; tile += step) {
    const double elements = of_moments ? p.elements(tile) : 0;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      // An address in any case: a branch between two loads would have one wait for the other.
      const int64_t at = channel + (k < count ? k : 0);
      const double a = tiles.first[tile * tiles.channels + at], b = tiles.second[tile * tiles.channels + at];
      const double d = of_moments ? a - tiles.first[at] : 0;
      own[0][k] += k >= count ? 0 : of_moments ? elements * d : a;
      own[1][k] += k >= count ? 0 : of_moments ? b + elements * d * d : b;
    }
  }
  part.for_sums(own, f);
}

// Those sums as moments: about the mean of a tile, which is part of the whole, so that little cancels.
__device__ __forceinline__ Moments moments_of(const Planes& p, const Tiles& tiles, int64_t channel,
                                              const double (&sums)[2]) {
  return Moments::about(tiles.first[channel], p.elements(), sums[0], sums[1]);
}

// Of each channel, one for a block, all tiles into the first one's place.
template <bool of_moments>
__global__ void __launch_bounds__(kThreads) merge_kernel(Planes p, Tiles tiles) {
  const Part<1> part(blockIdx.x);
  for_sums_of_tiles<of_moments>(p, tiles, part, [&](int, const double (&sums)[2]) {
    const Moments moments = of_moments ? moments_of(p, tiles, part.channel, sums) : Moments{0, sums[0], sums[1]};
    tiles.keep(0, part.channel, moments.mean, moments.squares);
  });
}

// Mean and squares of each tile: a thread's few rows in float (double for float64) about their own first element, then
// in double about one thread's mean, to which these add up without a division.
template <class T>
__global__ void __launch_bounds__(kThreads) collect_kernel(Planes p, const T* input, Tiles tiles, bool vectors) {
  using C = Compute<T>;
  constexpr int width = cuda::kWidth<T>;
  __shared__ double origins[kAcross * width];
  for_parts<width>(p, [&](const Part<width>& part) {
    for_tiles<T>(p, part, vectors, [&](const Tile<T>& tile) {
      C pivot[width] = {}, sums[2][width] = {};
      int elements[width] = {};
      bool first = true;
      tile.for_elements([&](const Rows<T>& rows, int64_t at) {
        C x[kUnroll<T>][width];
        rows.load(input + at, x);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          if (first) pivot[k] = x[0][k];
          elements[k] += k < rows.count ? rows.valid : 0;
#pragma unroll
          for (int r = 0; r < kUnroll<T>; ++r) {
            const C d = rows.has(r) && k < rows.count ? x[r][k] - pivot[k] : C(0);
            sums[0][k] += d;
            sums[1][k] += d * d;
          }
        }
        first = false;
      });
      if (threadIdx.y == 0 && (threadIdx.x == 0 || p.by_column)) {
#pragma unroll
        for (int k = 0; k < width; ++k) {
          if (k < (p.by_column ? width : 1))
            origins[int(threadIdx.x) * width + k] = double(pivot[k]) + double(sums[0][k] / C(elements[k]));
        }
      }
      __syncthreads();
      double origin[width], own[2][width];
      take(origins, p.by_column, origin);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const double d = double(pivot[k]) - origin[k], sum = double(sums[0][k]), moved = elements[k] * d;
        own[0][k] = elements[k] > 0 ? sum + moved : 0;
        own[1][k] = elements[k] > 0 ? double(sums[1][k]) + d * (2 * sum + moved) : 0;
      }
      part.for_sums(own, [&](int column, const double (&total)[2]) {
        const Moments moments = Moments::about(origins[column], p.elements(tile.index), total[0], total[1]);
        tiles.keep(tile.index, part.channel + column, moments.mean, moments.squares);
      });
    });
  });
}

// Without tiles the statistics are there already.
template <class T, class Op>
__global__ void __launch_bounds__(kThreads, 2)
    apply_kernel(Planes p, Tiles tiles, Channels<Compute<T>> channels, Activated<T, Op> activated, const T* input,
                 T* output, bool vectors) {
  using C = Compute<T>;
  constexpr int width = cuda::kWidth<T>;
  __shared__ Normalize<C> normalizers[kAcross * width];
  for_parts<width>(p, [&](const Part<width>& part) {
    for_sums_of_tiles<true>(p, tiles, part, [&](int column, const double (&sums)[2]) {
      const int64_t channel = part.channel + column;
      double mean, variance;
      if (tiles.count == 0) {
        mean = channels.mean(channel);
        variance = channels.variance(channel);
      } else {
        const Moments moments = moments_of(p, tiles, channel, sums);
        mean = moments.mean;
        variance = moments.squares / moments.count;
        if (blockIdx.x == 0 && blockIdx.y == 0) channels.keep(channel, mean, variance);
      }
      normalizers[column] = channels.normalize(channel, mean, variance);
    });
    Normalize<C> normalize[width];
    take(normalizers, p.by_column, normalize);
    for_elements<T>(p, part, vectors, [&](const Rows<T>& rows, int64_t at) {
      C x[kUnroll<T>][width];
      rows.load(input + at, x);
      activated.forward(normalize, x);
      rows.store(output + at, x);
    });
  });
}

// Of each tile the sums of the gradients, and of their products with x.
template <class T, class Op>
__global__ void __launch_bounds__(kThreads)
    products_kernel(Planes p, Channels<Compute<T>> channels, Activated<T, Op> activated, const T* grad_output,
                    const T* input, Tiles tiles, bool vectors) {
  using C = Compute<T>;
  constexpr int width = cuda::kWidth<T>;
  __shared__ Normalize<C> normalizers[kAcross * width];
  for_parts<width>(p, [&](const Part<width>& part) {
    for_columns(part.channels, [&](int column) {
      const int64_t channel = part.channel + column;
      normalizers[column] = channels.normalize(channel, channels.mean(channel), channels.variance(channel));
    });
    Normalize<C> normalize[width];
    take(normalizers, p.by_column, normalize);
    for_tiles<T>(p, part, vectors, [&](const Tile<T>& tile) {
      C sums[2][width] = {};
      tile.for_elements([&](const Rows<T>& rows, int64_t at) {
        C x[kUnroll<T>][width], g[kUnroll<T>][width];
        rows.load(grad_output + at, g);
        rows.load(input + at, x);
        activated.backward(normalize, x, g);
#pragma unroll
        for (int r = 0; r < kUnroll<T>; ++r) {
#pragma unroll
          for (int k = 0; k < width; ++k) {
            const C grad = g[r][k];
            const bool there = rows.has(r) && k < rows.count;
            sums[0][k] += there ? grad : C(0);
            sums[1][k] += there ? grad * (x[r][k] - normalize[k].center) : C(0);
          }
        }
      });
      part.for_sums(sums, [&](int column, const double (&total)[2]) {
        tiles.keep(tile.index, part.channel + column, total[0], total[1]);
      });
    });
  });
}

// Without tiles the sums are 0: of no elements, or nobody asks for them.
template <class T, class Op>
__global__ void __launch_bounds__(kThreads)
    apply_gradients_kernel(Planes p, Tiles tiles, Channels<Compute<T>> channels, Activated<T, Op> activated,
                           const T* grad_output, const T* input, T* grad_input, bool vectors) {
  using C = Compute<T>;
  constexpr int width = cuda::kWidth<T>;
  __shared__ Backpropagate<C> backpropagators[kAcross * width];
  for_parts<width>(p, [&](const Part<width>& part) {
    for_sums_of_tiles<false>(p, tiles, part, [&](int column, const double (&sums)[2]) {
      const int64_t channel = part.channel + column;
      Gradients<C> gradients = channels.gradients(channel, p.elements(), sums);
      if (tiles.count == 0) gradients.weight = 0;
      if (blockIdx.x == 0 && blockIdx.y == 0) channels.keep(channel, gradients);
      backpropagators[column] = {channels.normalize(channel, channels.mean(channel), channels.variance(channel)),
                                 gradients.slope, gradients.offset};
    });
    if (grad_input == nullptr) return;
    Backpropagate<C> back[width];
    take(backpropagators, p.by_column, back);
    for_elements<T>(p, part, vectors, [&](const Rows<T>& rows, int64_t at) {
      C x[kUnroll<T>][width], g[kUnroll<T>][width];
      rows.load(grad_output + at, g);
      rows.load(input + at, x);
      activated.backward(back, x, g);
#pragma unroll
      for (int r = 0; r < kUnroll<T>; ++r)
#pragma unroll
        for (int k = 0; k < width; ++k) g[r][k] = back[k].gradient(g[r][k], x[r][k]);
      rows.store(grad_input + at, g);
    });
  });
}

}  // namespace
}  // namespace gdbp::norm
