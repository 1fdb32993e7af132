#include <algorithm>

#include "common/half_tables_cpu.h"
#include "common/map_cpu.h"
#include "common/rows_cpu.h"
#include "linear/linear.h"

namespace gdbp::linear {
namespace {

using cpu::kDirect;
using cpu::Rows;

// Columns per work item: an accumulator row of this length stays in the first-level cache.
constexpr int64_t kColumnBlock = 1024;

template <class T>
GDBP_CLONES void add_bias(Rows<const T> product, const T* bias, Rows<Compute<T>> sum, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* const x = product[row];
    Compute<T>* const z = sum[row];
#pragma GCC ivdep
    for (int64_t col = 0; col < cols; ++col) z[col] = widen(x[col]) + widen(bias[col]);
  }
}

template <class C>
GDBP_CLONES void add_rows(Rows<const C> from, C* sums, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const C* const g = from[row];
#pragma GCC ivdep
    for (int64_t col = 0; col < cols; ++col) sums[col] += g[col];
  }
}

// Tables of half_tables_cpu.h, where there are some for T and the array is worth making them; else null.
template <class T>
const T* outputs_for(Activation activation, int64_t elements) {
  if constexpr (!kDirect<T>) return elements < cpu::kHalves ? nullptr : cpu::outputs<T>(activation);
  return nullptr;
}
template <class T>
const float* slopes_for(Activation activation, int64_t elements) {
  if constexpr (!kDirect<T>) return elements < cpu::kHalves ? nullptr : cpu::slopes<T>(activation);
  return nullptr;
}

template <class T>
void look_up(const T* table, Rows<const T> from, Rows<T> to, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* const z = from[row];
    T* const y = to[row];
    for (int64_t col = 0; col < cols; ++col) y[col] = table[z[col].bits];
  }
}

template <class T>
GDBP_CLONES void multiply_by_slopes(const float* table, Rows<const T> saved, Rows<float> g, int64_t rows,
                                    int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* const z = saved[row];
    float* const d = g[row];
#pragma GCC ivdep
    for (int64_t col = 0; col < cols; ++col) d[col] = math::normal(d[col] * table[z[col].bits]);
  }
}

template <class T>
void forward_block(const Forward& a, const T* outputs, int64_t offset, int64_t first_col, int64_t rows, int64_t cols) {
  using C = Compute<T>;
  const Rows<T> pre{static_cast<T*>(a.pre) + offset, a.cols}, output{static_cast<T*>(a.output) + offset, a.cols};
  const T* const bias = a.bias ? static_cast<const T*>(a.bias) + first_col : nullptr;
  if constexpr (kDirect<T>) {
    if (bias) add_bias<T>(pre, bias, pre, rows, cols);
    if (a.activation != Activation::none || pre.at != output.at) {
      cpu::activate<C>(a.activation, pre, output, rows, cols);
    }
  } else if (outputs && !bias) {
    look_up<T>(outputs, pre, output, rows, cols);
  } else {
    alignas(64) C buffer[cpu::kBlock];
    const Rows<C> sum{buffer, cols};
    if (bias) {
      add_bias<T>(pre, bias, sum, rows, cols);
      if (pre.at != output.at) cpu::narrow_rows<T>(sum, pre, rows, cols);
    } else {
      cpu::widen_rows<T>(pre, sum, rows, cols);
    }
    cpu::activate<C>(a.activation, sum, sum, rows, cols);
    cpu::narrow_rows<T>(sum, output, rows, cols);
  }
}

// Gradients of the pre-activation, and their column sums added to `sums` unless that is null.
template <class T>
void backward_block(const Backward& a, const float* slopes, int64_t offset, int64_t rows, int64_t cols,
                    Compute<T>* sums) {
  using C = Compute<T>;
  const bool linear = saves(a.activation) == Saved::nothing;
  const Rows<const T> grad_output{static_cast<const T*>(a.grad_output) + offset, a.cols};
  const Rows<const T> saved{linear ? grad_output.at : static_cast<const T*>(a.saved) + offset, a.cols};
  const Rows<T> grad_pre{a.grad_pre ? static_cast<T*>(a.grad_pre) + offset : nullptr, a.cols};
  if constexpr (kDirect<T>) {
    if (a.grad_pre) cpu::activate_backward<C>(a.activation, grad_output, saved, grad_pre, rows, cols);
    if (sums) add_rows<C>(a.grad_pre ? Rows<const C>(grad_pre) : grad_output, sums, rows, cols);
  } else {
    alignas(64) C buffers[2][cpu::kBlock];
    const Rows<C> g{buffers[0], cols}, s{buffers[1], cols};
    cpu::widen_rows<T>(grad_output, g, rows, cols);
    if (slopes) {
      multiply_by_slopes<T>(slopes, saved, g, rows, cols);
    } else if (!linear) {
      cpu::widen_rows<T>(saved, s, rows, cols);
      cpu::activate_backward<C>(a.activation, g, s, g, rows, cols);
    }
    if (a.grad_pre) cpu::narrow_rows<T>(g, grad_pre, rows, cols);
    if (sums) add_rows<C>(g, sums, rows, cols);
  }
}

// One tile of rows, one block of columns.
template <class T>
void backward_tile(const Backward& a, const float* slopes, int64_t tile, int64_t first_col) {
  using C = Compute<T>;
  const int64_t cols = std::min(a.cols - first_col, kColumnBlock);
  C* const sums = a.grad_bias ? static_cast<C*>(a.workspace) + tile * a.cols + first_col : nullptr;
  if (sums) std::fill(sums, sums + cols, C(0));
  const int64_t last_row = std::min(a.rows, (tile + 1) * kRowTile), step = cpu::block_rows(kRowTile, cols);
  for (int64_t row = tile * kRowTile; row < last_row; row += step) {
    backward_block<T>(a, slopes, row * a.cols + first_col, std::min(step, last_row - row), cols, sums);
  }
}

template <class T>
GDBP_CLONES void add_tiles(const Backward a, int64_t tiles, int64_t first_col, int64_t last_col) {
  using C = Compute<T>;
  C* const sums = static_cast<C*>(a.workspace);
  T* const grad_bias = static_cast<T*>(a.grad_bias);
  // The first tile's row is the accumulator: nothing else reads it afterwards.
  for (int64_t tile = 1; tile < tiles; ++tile) {
#pragma GCC ivdep
    for (int64_t col = first_col; col < last_col; ++col) sums[col] += sums[tile * a.cols + col];
  }
  for (int64_t col = first_col; col < last_col; ++col) grad_bias[col] = narrow<T>(tiles ? sums[col] : C(0));
}

}  // namespace

int forward_cpu(const Forward& a, void*) {
  if (a.rows == 0 || a.cols == 0) return 0;
  dispatch(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t grain = std::max<int64_t>(1, cpu::kGrain / 4 / a.cols);
    const T* const outputs = outputs_for<T>(a.activation, a.rows * a.cols);
    parallel_for(0, a.rows, grain, [&](int64_t lo, int64_t hi) {
      const int64_t step = cpu::block_rows(hi - lo, std::min(a.cols, kColumnBlock));
      for (int64_t row = lo; row < hi; row += step)
        for (int64_t col = 0; col < a.cols; col += kColumnBlock) {
          forward_block<T>(a, outputs, row * a.cols + col, col, std::min(step, hi - row),
                           std::min(kColumnBlock, a.cols - col));
        }
    });
  });
  return 0;
}

int backward_cpu(const Backward& a, void*) {
  if (a.cols == 0) return 0;
  const int64_t tiles = (a.rows + kRowTile - 1) / kRowTile;
  const int64_t blocks = (a.cols + kColumnBlock - 1) / kColumnBlock;
  const int64_t item = kRowTile * std::min(a.cols, kColumnBlock);
  const int64_t grain = std::max<int64_t>(1, cpu::kGrain / 2 / item);
  dispatch(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const float* const slopes = slopes_for<T>(a.activation, a.rows * a.cols);
    parallel_for(0, tiles * blocks, grain, [&](int64_t lo, int64_t hi) {
      for (int64_t i = lo; i < hi; ++i) backward_tile<T>(a, slopes, i / blocks, i % blocks * kColumnBlock);
    });
    if (!a.grad_bias) return;
    parallel_for(0, blocks, std::max<int64_t>(1, cpu::kGrain / (kColumnBlock * (tiles + 1))),
                 [&](int64_t lo, int64_t hi) {
                   add_tiles<T>(a, tiles, lo * kColumnBlock, std::min(a.cols, hi * kColumnBlock));
                 });
  });
  return 0;
}

}  // namespace gdbp::linear
