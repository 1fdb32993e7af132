// A thread keeps to one column and walks down the rows of a tile; threads of a warp read neighbouring columns.
#include "common/reduce_cuda.cuh"
#include "units/units.h"

namespace gdbp::units {
namespace {

constexpr int kColumns = cuda::kWarp, kRows = cuda::kThreads / kColumns;
// blockIdx.y loops where the hardware's limit is below the need.
constexpr int64_t kMaxGridY = 65535;

template <class T>
__global__ void __launch_bounds__(cuda::kThreads)
    tile_kernel(int64_t rows, int64_t units, const T* GDBP_RESTRICT output, double low, double high, Tally* tallies) {
  __shared__ Tally partial[kRows][kColumns];
  const int64_t tile = blockIdx.x, end = (tile + 1) * kRowTile < rows ? (tile + 1) * kRowTile : rows;
  for (int64_t first = int64_t(blockIdx.y) * kColumns; first < units; first += int64_t(gridDim.y) * kColumns) {
    const int64_t unit = first + threadIdx.x;
    Tally tally{};
    if (unit < units) {
      for (int64_t row = tile * kRowTile + threadIdx.y; row < end; row += kRows) {
        tally.add(double(widen(output[row * units + unit])), low, high);
      }
    }
    partial[threadIdx.y][threadIdx.x] = tally;
    for (int distance = kRows / 2; distance > 0; distance /= 2) {
      __syncthreads();
      if (int(threadIdx.y) < distance)
        partial[threadIdx.y][threadIdx.x].add(partial[threadIdx.y + distance][threadIdx.x]);
    }
    if (threadIdx.y == 0 && unit < units) tallies[tile * units + unit] = partial[0][threadIdx.x];
    __syncthreads();
  }
}

__global__ void __launch_bounds__(cuda::kThreads)
    total_kernel(int64_t tiles, int64_t units, const Tally* GDBP_RESTRICT tallies, double* result) {
  const int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (unit >= units) return;
  Tally total{};
  for (int64_t tile = 0; tile < tiles; ++tile) total.add(tallies[tile * units + unit]);
  result[unit] = total.flat;
  result[units + unit] = total.sum;
  result[2 * units + unit] = total.squares;
}

}  // namespace

int count_cuda(const Count& a, void* stream) {
  if (a.units == 0) return 0;
  const int64_t n = tiles(a.rows);
  if (n > 0) {
    const int error = dispatch(a.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const int64_t across = cuda::ceil_div(a.units, kColumns);
      return GDBP_LAUNCH(tile_kernel<T>, dim3(unsigned(n), unsigned(across < kMaxGridY ? across : kMaxGridY)),
                         dim3(kColumns, kRows), 0, stream, a.rows, a.units, static_cast<const T*>(a.output), a.low,
                         a.high, a.workspace);
    });
    if (error != 0) return error;
  }
  return GDBP_LAUNCH(total_kernel, unsigned(cuda::ceil_div(a.units, cuda::kThreads)), cuda::kThreads, 0, stream, n,
                     a.units, static_cast<const Tally*>(a.workspace), a.result);
}

}  // namespace gdbp::units
