#include <algorithm>

#include "common/map_cpu.h"
#include "units/units.h"

namespace gdbp::units {
namespace {

constexpr int64_t kColumnBlock = 256;
// Rows that are added before the tallies are touched again.
constexpr int kUnroll = 4;

// Tallies of a block of columns, as arrays: a loop over structs would not vectorise.
struct Block {
  double flat[kColumnBlock] = {}, sum[kColumnBlock] = {}, squares[kColumnBlock] = {};
};

template <int n, class T>
GDBP_HD void add_rows(const T* y, int64_t step, int64_t cols, double low, double high, Block& block) {
#pragma GCC ivdep
  for (int64_t col = 0; col < cols; ++col) {
    Tally tally{};
#pragma GCC unroll 4
    for (int k = 0; k < n; ++k) tally.add(double(widen(y[k * step + col])), low, high);
    block.flat[col] += tally.flat;
    block.sum[col] += tally.sum;
    block.squares[col] += tally.squares;
  }
}

template <class T>
GDBP_CLONES void count_tile(const Count a, int64_t first, int64_t last, int64_t col, int64_t cols, Block& block) {
  const T* const y = static_cast<const T*>(a.output) + col;
  int64_t row = first;
  for (; row + kUnroll <= last; row += kUnroll)
    add_rows<kUnroll>(y + row * a.units, a.units, cols, a.low, a.high, block);
  for (; row < last; ++row) add_rows<1>(y + row * a.units, a.units, cols, a.low, a.high, block);
}

}  // namespace

int count_cpu(const Count& a, void*) {
  const int64_t n = tiles(a.rows), blocks = (a.units + kColumnBlock - 1) / kColumnBlock;
  const int64_t item = std::max<int64_t>(1, std::min(kRowTile, a.rows) * std::min(a.units, kColumnBlock));
  dispatch(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(0, n * blocks, std::max<int64_t>(1, cpu::kGrain / 2 / item), [&](int64_t lo, int64_t hi) {
      for (int64_t i = lo; i < hi; ++i) {
        const int64_t tile = i / blocks, col = i % blocks * kColumnBlock, cols = std::min(kColumnBlock, a.units - col);
        Block block;
        count_tile<T>(a, tile * kRowTile, std::min(a.rows, (tile + 1) * kRowTile), col, cols, block);
        for (int64_t c = 0; c < cols; ++c)
          a.workspace[tile * a.units + col + c] = {block.flat[c], block.sum[c], block.squares[c]};
      }
    });
  });
  parallel_for(0, a.units, std::max<int64_t>(1, cpu::kGrain / 4 / (n + 1)), [&](int64_t lo, int64_t hi) {
    for (int64_t unit = lo; unit < hi; ++unit) {
      Tally total{};
      for (int64_t tile = 0; tile < n; ++tile) total.add(a.workspace[tile * a.units + unit]);
      a.result[unit] = total.flat;
      a.result[a.units + unit] = total.sum;
      a.result[2 * a.units + unit] = total.squares;
    }
  });
  return 0;
}

}  // namespace gdbp::units
