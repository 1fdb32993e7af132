#include <algorithm>

#include "common/map_cpu.h"
#include "linear/linear.h"

namespace gdbp::linear {
namespace {

// Columns per work item: an accumulator row of this length stays in the first-level cache.
constexpr int64_t kColumnBlock = 1024;

// What is asked for is known when these loops are compiled: a question inside would keep them from vectorising.
template <class Op, class T, bool with_bias, bool keep_pre>
GDBP_CLONES void forward_rows(const Forward a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const T* const bias = static_cast<const T*>(a.bias);
  for (int64_t row = begin; row < end; ++row) {
    T* const z = static_cast<T*>(a.pre) + row * a.cols;
    T* const y = static_cast<T*>(a.output) + row * a.cols;
#pragma GCC ivdep
    for (int64_t col = 0; col < a.cols; ++col) {
      const C sum = widen(z[col]) + (with_bias ? widen(bias[col]) : C(0));
      if (keep_pre) z[col] = narrow<T>(sum);
      y[col] = narrow<T>(Op::forward(sum));
    }
  }
}

// One tile of rows, one block of columns: gradients of the pre-activation, and their column sums.
template <class Op, class T, bool with_sums>
GDBP_CLONES void backward_block(const Backward a, int64_t tile, int64_t first_col, int64_t last_col) {
  using C = Compute<T>;
  constexpr bool linear = Op::saves == Saved::nothing;
  const T* const grad_output = static_cast<const T*>(a.grad_output);
  const T* const saved = static_cast<const T*>(a.saved);
  T* const grad_pre = static_cast<T*>(a.grad_pre);
  C* const sums = with_sums ? static_cast<C*>(a.workspace) + tile * a.cols : nullptr;
  if (with_sums) std::fill(sums + first_col, sums + last_col, C(0));
  const int64_t last_row = std::min(a.rows, (tile + 1) * kRowTile);
  for (int64_t row = tile * kRowTile; row < last_row; ++row) {
    const int64_t offset = row * a.cols;
#pragma GCC ivdep
    for (int64_t col = first_col; col < last_col; ++col) {
      const C s = linear ? C(0) : widen(saved[offset + col]);
      const C g = Op::backward(widen(grad_output[offset + col]), s);
      if (!linear || grad_pre) grad_pre[offset + col] = narrow<T>(g);
      if (with_sums) sums[col] += g;
    }
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
  dispatch(a.activation, [&](auto op) {
    dispatch(a.dtype, [&](auto type) {
      using Op = decltype(op);
      using T = typename decltype(type)::type;
      const bool keep_pre = a.output != a.pre;
      const auto rows = a.bias ? (keep_pre ? forward_rows<Op, T, true, true> : forward_rows<Op, T, true, false>)
                               : (keep_pre ? forward_rows<Op, T, false, true> : forward_rows<Op, T, false, false>);
      const int64_t grain = std::max<int64_t>(1, cpu::kGrain / 4 / a.cols);
      parallel_for(0, a.rows, grain, [&](int64_t lo, int64_t hi) { rows(a, lo, hi); });
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
    dispatch(a.activation, [&](auto op) {
      using Op = decltype(op);
      const auto block = a.grad_bias ? backward_block<Op, T, true> : backward_block<Op, T, false>;
      parallel_for(0, tiles * blocks, grain, [&](int64_t lo, int64_t hi) {
        for (int64_t i = lo; i < hi; ++i) {
          const int64_t col = i % blocks * kColumnBlock;
          block(a, i / blocks, col, std::min(a.cols, col + kColumnBlock));
        }
      });
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
