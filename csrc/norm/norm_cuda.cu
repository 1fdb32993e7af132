// Batch normalisation on CUDA: short columns in one launch (slab_cuda.cuh), else in tiles (tiles_cuda.cuh). No atomics.
#include <algorithm>

#include "norm/slab_cuda.cuh"
#include "norm/tiles_cuda.cuh"

namespace gdbp::norm {
namespace {

// One block where the momentum depends on the number of batches, so that all threads have read it before it changes.
template <class T>
__global__ void __launch_bounds__(kThreads) update_kernel(Update a) {
  const double batches = a.batches != nullptr ? double(*a.batches + 1) : 0;
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0 && a.batches != nullptr) *a.batches += 1;
  if (a.elements == 0) return;
  const double momentum = a.cumulative ? 1 / batches : a.momentum;
  T *const mean = static_cast<T*>(a.running_mean), *const variance = static_cast<T*>(a.running_var);
  const T* const offset = static_cast<const T*>(a.offset);
  for (int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x; c < a.channels; c += int64_t(gridDim.x) * kThreads) {
    const double batch_mean = a.stats[c] + (offset != nullptr ? double(widen(offset[c])) : 0);
    const double batch_var = a.stats[a.channels + c] * (a.elements / (a.elements - 1));
    mean[c] = narrow<T>(Compute<T>(moving_average(double(widen(mean[c])), batch_mean, momentum)));
    variance[c] = narrow<T>(Compute<T>(moving_average(double(widen(variance[c])), batch_var, momentum)));
  }
}

// ---- launches ----

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

// Blocks that fill a large GPU. With more the same tiles would be added up more often.
constexpr int64_t kBlocks = 512;
// Steps of kUnroll rows that a thread takes at most in a tile of a matrix: more would cost digits. Never fewer rows
// than kRowTile, for whose tiles the workspace has room.
constexpr int64_t kMostSteps = 8;
// More tiles than that are added up once, by a launch of its own.
constexpr int64_t kMostTiles = 128;

// How the elements are cut into tiles, and the passes over them into blocks.
template <class T>
struct Launch {
  static constexpr int width = cuda::kWidth<T>;
  Planes planes;
  dim3 tile_grid, tile_block, map_grid, map_block;
  Tiles tiles;

  Launch(const Shape& shape, void* workspace) : planes(shape) {
    const bool by_column = planes.by_column;
    const int64_t groups = cuda::ceil_div(planes.cols, width);
    // Of a plane at most 32 across, so that 8 rows of a tile are in flight.
    tile_block = block_of(groups, by_column ? kAcross : 32);
    map_block = block_of(groups, by_column ? kAcross : kThreads);
    const int64_t across = cuda::ceil_div(groups, map_block.x), parts = by_column ? across : planes.count;
    const int64_t rows = kUnroll<T> * int64_t(map_block.y), down = cuda::ceil_div(planes.rows, rows);
    // Which tiles there are depends on the shape alone.
    if (by_column) planes.row_tile = rows * std::clamp<int64_t>(down * parts / kBlocks, 1, kMostSteps);
    tile_grid =
        dim3(unsigned(planes.row_tiles()), by_column ? 1 : at_most_grid(planes.column_tiles()), at_most_grid(parts));
    // As many steps for every block. Without elements one block of each part still writes gradients of weights.
    const int64_t budget = std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, parts));
    const int64_t y = by_column ? 1 : std::clamp<int64_t>(across, 1, budget);
    const int64_t steps = std::max<int64_t>(1, cuda::ceil_div(down * y, budget));
    map_grid = dim3(unsigned(std::max<int64_t>(1, cuda::ceil_div(down, steps))), unsigned(y), at_most_grid(parts));
    double* const sums = static_cast<double*>(workspace);
    tiles = {sums, sums + planes.tiles() * shape.channels, shape.channels, planes.tiles()};
  }
  // Whether every row starts where a vector may.
  template <class... Pointers>
  bool vectors(Pointers... pointers) const {
    return planes.row_step % width == 0 && planes.plane_step % width == 0 && (cuda::aligned(pointers) && ...);
  }
  // What is left to add up once `tiles` are computed.
  template <bool of_moments>
  int merge(void* stream) {
    if (tiles.count <= kMostTiles) return 0;
    const int error =
        GDBP_LAUNCH(merge_kernel<of_moments>, unsigned(tiles.channels), kThreads, 0, stream, planes, tiles);
    tiles.count = 1;
    return error;
  }
};

template <class T>
int forward(const Forward& a, void* stream) {
  using C = Compute<T>;
  Launch<T> l(a.shape, a.workspace);
  const Channels<C> channels{a.shape.channels, a.stats, a.eps, static_cast<const C*>(a.weight),
                             static_cast<const C*>(a.bias)};
  const T* const input = static_cast<const T*>(a.input);
  T* const output = static_cast<T*>(a.output);
  const bool vectors = l.vectors(a.input, a.output), slabs = a.of_batch && suits_slabs<T>(l.planes);
  if (!a.of_batch) {
    l.tiles.count = 0;
  } else if (!slabs) {
    int error = GDBP_LAUNCH(collect_kernel<T>, l.tile_grid, l.tile_block, 0, stream, l.planes, input, l.tiles, vectors);
    if (error == 0) error = l.template merge<true>(stream);
    if (error != 0) return error;
  }
  return dispatch_activation<T>(a.activation, [&](auto activated) {
    using Op = typename decltype(activated)::Op;
    if (slabs) {
      const auto kernel = slab_forward_kernel<T, Op>;
      return GDBP_LAUNCH(kernel, slabs_of<T>(l.planes), kSlabBlock, 0, stream, l.planes.rows, channels, activated,
                         input, output, vectors);
    }
    const auto kernel = apply_kernel<T, Op>;
    return GDBP_LAUNCH(kernel, l.map_grid, l.map_block, 0, stream, l.planes, l.tiles, channels, activated, input,
                       output, vectors);
  });
}

template <class T>
int backward(const Backward& a, void* stream) {
  using C = Compute<T>;
  Launch<T> l(a.shape, a.workspace);
  const Channels<C> channels{a.shape.channels,
                             const_cast<double*>(a.stats),
                             a.eps,
                             static_cast<const C*>(a.weight),
                             static_cast<const C*>(a.bias),
                             a.of_batch,
                             static_cast<C*>(a.grad_weight),
                             static_cast<C*>(a.grad_bias)};
  const T *const g = static_cast<const T*>(a.grad_output), *const x = static_cast<const T*>(a.input);
  T* const grad_input = l.tiles.count > 0 ? static_cast<T*>(a.grad_input) : nullptr;
  const bool sums = a.of_batch || a.grad_weight != nullptr || a.grad_bias != nullptr;
  const bool vectors = l.vectors(a.grad_output, a.input, a.grad_input);
  if (!sums) l.tiles.count = 0;
  if (grad_input == nullptr) l.map_grid.x = l.map_grid.y = 1;
  return dispatch_activation<T>(a.activation, [&](auto activated) {
    using Op = typename decltype(activated)::Op;
    if (sums && suits_slabs<T>(l.planes)) {
      const auto kernel = slab_backward_kernel<T, Op>;
      return GDBP_LAUNCH(kernel, slabs_of<T>(l.planes), kSlabBlock, 0, stream, l.planes.rows, channels, activated, g, x,
                         grad_input, vectors);
    }
    if (l.tiles.count > 0) {
      const auto kernel = products_kernel<T, Op>;
      int error = GDBP_LAUNCH(kernel, l.tile_grid, l.tile_block, 0, stream, l.planes, channels, activated, g, x,
                              l.tiles, vectors);
      if (error == 0) error = l.template merge<false>(stream);
      if (error != 0) return error;
    }
    const auto kernel = apply_gradients_kernel<T, Op>;
    return GDBP_LAUNCH(kernel, l.map_grid, l.map_block, 0, stream, l.planes, l.tiles, channels, activated, g, x,
                       grad_input, vectors);
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
  const int64_t blocks = a.cumulative ? 1 : std::clamp<int64_t>(cuda::ceil_div(a.channels, kThreads), 1, kBlocks);
  return dispatch(a.dtype, [&](auto type) {
    return GDBP_LAUNCH(update_kernel<typename decltype(type)::type>, unsigned(blocks), kThreads, 0, stream, a);
  });
}

}  // namespace gdbp::norm
