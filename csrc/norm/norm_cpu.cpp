#include <algorithm>
#include <type_traits>

#include "common/map_cpu.h"
#include "common/rows_cpu.h"
#include "norm/norm.h"

namespace gdbp::norm {
namespace {

using cpu::kDirect;
using cpu::Rows;

// One tile: its place in the input, and whose it is.
struct Tile {
  int64_t index;    // among its channel's
  int64_t channel;  // of its first column
  int64_t start, rows, cols;
};

struct Tiling : Planes {
  int64_t channels;

  explicit Tiling(const Shape& shape) : Planes(shape), channels(shape.channels) {}

  Tile at(int64_t item) const {
    const int64_t column_tile = item % column_tiles(), rest = item / column_tiles();
    const int64_t row_tile = rest % row_tiles(), plane = rest / row_tiles();
    const int64_t row = row_tile * kRowTile, col = column_tile * kColumnTile;
    return {by_column ? row_tile : row_tile * column_tiles() + column_tile, by_column ? col : plane,
            plane * plane_step + row * row_step + col, std::min(kRowTile, rows - row),
            std::min(kColumnTile, cols - col)};
  }
  template <class F>
  void for_tiles(const F& f) const {
    const int64_t items = count * row_tiles() * column_tiles();
    const int64_t size = std::max<int64_t>(1, std::min(kRowTile, rows) * std::min(kColumnTile, cols));
    parallel_for(0, items, std::max<int64_t>(1, cpu::kGrain / 4 / size), [&](int64_t lo, int64_t hi) {
      for (int64_t item = lo; item < hi; ++item) f(at(item));
    });
  }
  template <class F>
  void for_channels(const F& f) const {
    const int64_t grain = std::max<int64_t>(kColumnTile, cpu::kGrain / 8 / (tiles() + 1));
    parallel_for(0, channels, grain, f);
  }
};

// The workspace: two sums for each tile and channel, then five coefficients for each channel.
template <class C>
struct Workspace {
  double* first;
  double* second;
  C* coefficients[5];

  Workspace(void* memory, const Tiling& t) : first(static_cast<double*>(memory)) {
    const int64_t sums = t.tiles() * t.channels;
    second = first + sums;
    for (int i = 0; i < 5; ++i) coefficients[i] = reinterpret_cast<C*>(second + sums) + i * t.channels;
  }
};

// The coefficients of a tile's columns, one for each: where all columns are of one channel, copies of its own.
template <class C, int n>
class PerColumn {
 public:
  const C* at[n];

  PerColumn(const Workspace<C>& workspace, const Tiling& tiling, const Tile& tile) {
    for (int i = 0; i < n; ++i) {
      at[i] = workspace.coefficients[i] + tile.channel;
      if (tiling.by_column) continue;
      std::fill(copies_[i], copies_[i] + tile.cols, *at[i]);
      at[i] = copies_[i];
    }
  }

 private:
  C copies_[n][kColumnTile];
};

// Columns of sums: what a tile adds up before it is left in the workspace.
struct Sums {
  double first[kColumnTile] = {}, second[kColumnTile] = {};
};

// ---- the loops: four rows at a time, so that the sums are loaded and stored once for four ----

constexpr int kUnroll = 4;
// Rows that pass through a buffer together: a multiple of kUnroll, as kBlock / kColumnTile is one.
int64_t rows_at_once(int64_t cols) { return std::max<int64_t>(kUnroll, cpu::kBlock / cols / kUnroll * kUnroll); }
static_assert(cpu::kBlock / kColumnTile >= kUnroll);

template <int n, class T>
GDBP_HD void add_moments(const T* x, int64_t step, int64_t cols, const double* pivot, Sums& sums) {
#pragma GCC ivdep
  for (int64_t col = 0; col < cols; ++col) {
    double sum = 0, squares = 0;
#pragma GCC unroll 4
    for (int k = 0; k < n; ++k) {
      const double d = double(widen(x[k * step + col])) - pivot[col];
      sum += d;
      squares += d * d;
    }
    sums.first[col] += sum;
    sums.second[col] += squares;
  }
}

template <class T>
GDBP_CLONES void collect(const T* x, int64_t step, int64_t rows, int64_t cols, const double* pivot, Sums& sums) {
  int64_t row = 0;
  for (; row + kUnroll <= rows; row += kUnroll) add_moments<kUnroll>(x + row * step, step, cols, pivot, sums);
  for (; row < rows; ++row) add_moments<1>(x + row * step, step, cols, pivot, sums);
}

// The pre-activations: the normalised elements.
template <class T>
GDBP_CLONES void normalize(Rows<const T> in, Rows<Compute<T>> out, int64_t rows, int64_t cols, const Compute<T>* center,
                           const Compute<T>* scale, const Compute<T>* shift) {
  using C = Compute<T>;
  for (int64_t row = 0; row < rows; ++row) {
    const T* const x = in[row];
    C* const z = out[row];
#pragma GCC ivdep
    for (int64_t col = 0; col < cols; ++col) z[col] = Normalize<C>{center[col], scale[col], shift[col]}(widen(x[col]));
  }
}

template <int n, class T>
GDBP_HD void add_products(Rows<const Compute<T>> grads, Rows<const T> in, int64_t row, int64_t cols,
                          const Compute<T>* center, Sums& sums) {
  using C = Compute<T>;
  const C* const g = grads[row];
  const T* const x = in[row];
#pragma GCC ivdep
  for (int64_t col = 0; col < cols; ++col) {
    C sum = 0, products = 0;
#pragma GCC unroll 4
    for (int k = 0; k < n; ++k) {
      const C grad = g[k * grads.step + col];
      sum += grad;
      products += grad * (widen(x[k * in.step + col]) - center[col]);
    }
    sums.first[col] += double(sum);
    sums.second[col] += double(products);
  }
}

// Of the gradients of the pre-activations, and of their products with the elements.
template <class T>
GDBP_CLONES void collect_gradients(Rows<const Compute<T>> grads, Rows<const T> x, int64_t rows, int64_t cols,
                                   const Compute<T>* center, Sums& sums) {
  int64_t row = 0;
  for (; row + kUnroll <= rows; row += kUnroll) add_products<kUnroll, T>(grads, x, row, cols, center, sums);
  for (; row < rows; ++row) add_products<1, T>(grads, x, row, cols, center, sums);
}

template <class T>
GDBP_CLONES void apply_gradients(Rows<const Compute<T>> grads, Rows<const T> in, Rows<T> out, int64_t rows,
                                 int64_t cols, const Compute<T>* center, const Compute<T>* scale,
                                 const Compute<T>* slope, const Compute<T>* offset) {
  for (int64_t row = 0; row < rows; ++row) {
    const Compute<T>* const g = grads[row];
    const T* const x = in[row];
    T* const grad_x = out[row];
#pragma GCC ivdep
    for (int64_t col = 0; col < cols; ++col) {
      grad_x[col] = narrow<T>(input_gradient(g[col], widen(x[col]), center[col], scale[col], slope[col], offset[col]));
    }
  }
}

// Tile after tile into the first one's place: nothing else reads it afterwards.
GDBP_CLONES void merge_tiles(const Tiling& t, double* means, double* squares, int64_t begin, int64_t end) {
  double seen = t.elements(0);
  for (int64_t tile = 1; tile < t.tiles(); ++tile) {
    const double count = t.elements(tile);
    const double *other_means = means + tile * t.channels, *other_squares = squares + tile * t.channels;
#pragma GCC ivdep
    for (int64_t c = begin; c < end; ++c) {
      const Moments all = merge({seen, means[c], squares[c]}, {count, other_means[c], other_squares[c]});
      means[c] = all.mean;
      squares[c] = all.squares;
    }
    seen += count;
  }
}

GDBP_CLONES void add_tiles(const Tiling& t, double* sums, int64_t begin, int64_t end) {
  for (int64_t tile = 1; tile < t.tiles(); ++tile) {
    const double* const other = sums + tile * t.channels;
#pragma GCC ivdep
    for (int64_t c = begin; c < end; ++c) sums[c] += other[c];
  }
}

// ---- the passes ----

template <class T>
void compute_stats(const Forward& a, const Tiling& t, const Workspace<Compute<T>>& w) {
  const T* const input = static_cast<const T*>(a.input);
  t.for_tiles([&](const Tile& tile) {
    const T* const x = input + tile.start;
    double pivot[kColumnTile];
    for (int64_t col = 0; col < tile.cols; ++col) pivot[col] = double(widen(x[t.by_column ? col : 0]));
    const double count = t.elements(tile.index);
    Sums sums;
    const auto collect_once = [&] {
      sums = Sums();
      collect(x, t.row_step, tile.rows, tile.cols, pivot, sums);
      if (t.by_column) return;
      for (int64_t col = 1; col < tile.cols; ++col) {
        sums.first[0] += sums.first[col];
        sums.second[0] += sums.second[col];
      }
    };
    collect_once();
    if (std::is_same_v<T, double>) {
      // Sums of other types have digits to spare. Here the tile is read again, from the cache, about its mean.
      for (int64_t col = 0; col < tile.cols; ++col) pivot[col] += sums.first[t.by_column ? col : 0] / count;
      collect_once();
    }
    const int64_t at = tile.index * t.channels + tile.channel;
    for (int64_t col = 0; col < (t.by_column ? tile.cols : 1); ++col) {
      const Moments moments = Moments::about(pivot[col], count, sums.first[col], sums.second[col]);
      w.first[at + col] = moments.mean;
      w.second[at + col] = moments.squares;
    }
  });
  const double count = t.elements();
  t.for_channels([&](int64_t begin, int64_t end) {
    merge_tiles(t, w.first, w.second, begin, end);
    for (int64_t c = begin; c < end; ++c) {
      a.stats[c] = w.first[c];
      a.stats[t.channels + c] = w.second[c] / count;
    }
  });
}

template <class C, class Args>
void compute_coefficients(const Args& a, const Tiling& t, const Workspace<C>& w) {
  const C *const weight = static_cast<const C*>(a.weight), *const bias = static_cast<const C*>(a.bias);
  t.for_channels([&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const auto normalize = Normalize<C>::of(a.stats[c], a.stats[t.channels + c], a.eps, weight ? weight[c] : C(1),
                                              bias ? bias[c] : C(0));
      w.coefficients[0][c] = normalize.center;
      w.coefficients[1][c] = normalize.scale;
      w.coefficients[2][c] = normalize.shift;
    }
  });
}

// Output of a tile.
template <class T>
void apply(const Forward& a, const Tiling& t, const Tile& tile, const PerColumn<Compute<T>, 3>& by) {
  using C = Compute<T>;
  const int64_t step = rows_at_once(tile.cols);
  for (int64_t row = 0; row < tile.rows; row += step) {
    const int64_t rows = std::min(step, tile.rows - row), start = tile.start + row * t.row_step;
    const Rows<const T> x{static_cast<const T*>(a.input) + start, t.row_step};
    const Rows<T> y{static_cast<T*>(a.output) + start, t.row_step};
    const auto through = [&](Rows<C> z) {
      normalize<T>(x, z, rows, tile.cols, by.at[0], by.at[1], by.at[2]);
      if (a.activation != Activation::none) cpu::activate<C>(a.activation, z, z, rows, tile.cols);
    };
    if constexpr (kDirect<T>) {
      through(y);
    } else {
      alignas(64) C buffer[cpu::kBlock];
      const Rows<C> z{buffer, tile.cols};
      through(z);
      cpu::narrow_rows<T>(z, y, rows, tile.cols);
    }
  }
}

// Where the gradients of the pre-activations stay from the sums on until they are applied: in their results' place, if
// they fit there and took any trouble. Null where they are formed anew.
template <class T>
T* kept_gradients(const Backward& a) {
  const bool kept = kDirect<T> && a.activation != Activation::none && (a.of_batch || a.grad_weight || a.grad_bias);
  return kept ? static_cast<T*>(a.grad_input) : nullptr;
}

// Calls f(grads, start, rows) with the gradients of a tile's pre-activations, a few rows at a time, from element
// `start` of the input on; these also go to `kept`, if it is not null.
template <class T, int n, class F>
void for_gradients(const Backward& a, const Tiling& t, const Tile& tile, const PerColumn<Compute<T>, n>& by, T* kept,
                   const F& f) {
  using C = Compute<T>;
  alignas(64) C buffers[2][cpu::kBlock];
  const Rows<C> z{buffers[0], tile.cols}, staged{buffers[1], tile.cols};
  const int64_t step = rows_at_once(tile.cols);
  for (int64_t row = 0; row < tile.rows; row += step) {
    const int64_t rows = std::min(step, tile.rows - row), start = tile.start + row * t.row_step;
    const Rows<const T> stored{static_cast<const T*>(a.grad_output) + start, t.row_step};
    Rows<const C> g = staged;
    if constexpr (kDirect<T>) {
      g = stored;
    } else {
      cpu::widen_rows<T>(stored, staged, rows, tile.cols);
    }
    if (a.activation != Activation::none) {
      const Rows<const T> x{static_cast<const T*>(a.input) + start, t.row_step};
      normalize<T>(x, z, rows, tile.cols, by.at[0], by.at[1], by.at[2]);
      if (saves(a.activation) == Saved::output) cpu::activate<C>(a.activation, z, z, rows, tile.cols);
      Rows<C> to = staged;
      if constexpr (kDirect<T>) {
        if (kept) to = {kept + start, t.row_step};
      }
      cpu::activate_backward<C>(a.activation, g, z, to, rows, tile.cols);
      g = to;
    }
    f(g, start, rows);
  }
}

template <class T>
void sum_gradients(const Backward& a, const Tiling& t, const Workspace<Compute<T>>& w) {
  t.for_tiles([&](const Tile& tile) {
    const PerColumn<Compute<T>, 3> by(w, t, tile);
    Sums sums;
    const auto collect = [&](Rows<const Compute<T>> grads, int64_t start, int64_t rows) {
      const Rows<const T> x{static_cast<const T*>(a.input) + start, t.row_step};
      collect_gradients<T>(grads, x, rows, tile.cols, by.at[0], sums);
    };
    for_gradients<T>(a, t, tile, by, kept_gradients<T>(a), collect);
    const int64_t at = tile.index * t.channels + tile.channel;
    if (t.by_column) {
      std::copy(sums.first, sums.first + tile.cols, w.first + at);
      std::copy(sums.second, sums.second + tile.cols, w.second + at);
    } else {
      w.first[at] = w.second[at] = 0;
      for (int64_t col = 0; col < tile.cols; ++col) {
        w.first[at] += sums.first[col];
        w.second[at] += sums.second[col];
      }
    }
  });
}

template <class C>
void finish_gradients(const Backward& a, const Tiling& t, const Workspace<C>& w) {
  const C* const weight = static_cast<const C*>(a.weight);
  C *const grad_weight = static_cast<C*>(a.grad_weight), *const grad_bias = static_cast<C*>(a.grad_bias);
  const double count = t.elements();
  const bool any = t.tiles() > 0;
  t.for_channels([&](int64_t begin, int64_t end) {
    add_tiles(t, w.first, begin, end);
    add_tiles(t, w.second, begin, end);
    for (int64_t c = begin; c < end; ++c) {
      const auto grads = Gradients<C>::of(a.stats[c], a.stats[t.channels + c], a.eps, weight ? weight[c] : C(1), count,
                                          any ? w.first[c] : 0, any ? w.second[c] : 0, a.of_batch);
      if (grad_weight) grad_weight[c] = any ? grads.weight : C(0);
      if (grad_bias) grad_bias[c] = grads.bias;
      w.coefficients[3][c] = grads.slope;
      w.coefficients[4][c] = grads.offset;
    }
  });
}

}  // namespace

int forward_cpu(const Forward& a, void*) {
  const Tiling t(a.shape);
  if (t.rows == 0 || t.cols == 0 || t.count == 0) return 0;
  dispatch(a.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Workspace<Compute<T>> w(a.workspace, t);
    if (a.of_batch) compute_stats<T>(a, t, w);
    compute_coefficients(a, t, w);
    t.for_tiles([&](const Tile& tile) { apply<T>(a, t, tile, PerColumn<Compute<T>, 3>(w, t, tile)); });
  });
  return 0;
}

int backward_cpu(const Backward& a, void*) {
  const Tiling t(a.shape);
  dispatch(a.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Workspace<Compute<T>> w(a.workspace, t);
    compute_coefficients(a, t, w);
    const bool sums = a.of_batch || a.grad_weight || a.grad_bias;
    if (sums) sum_gradients<T>(a, t, w);
    if (sums) finish_gradients(a, t, w);
    if (!a.grad_input) return;
    if (!sums) std::fill(w.coefficients[3], w.coefficients[3] + 2 * t.channels, Compute<T>(0));
    t.for_tiles([&](const Tile& tile) {
      const PerColumn<Compute<T>, 5> by(w, t, tile);
      const auto apply = [&](Rows<const Compute<T>> grads, int64_t start, int64_t rows) {
        const Rows<const T> x{static_cast<const T*>(a.input) + start, t.row_step};
        const Rows<T> grad_x{static_cast<T*>(a.grad_input) + start, t.row_step};
        apply_gradients<T>(grads, x, grad_x, rows, tile.cols, by.at[0], by.at[1], by.at[3], by.at[4]);
      };
      if constexpr (kDirect<T>) {
        if (const T* const kept = kept_gradients<T>(a))
          return apply({kept + tile.start, t.row_step}, tile.start, tile.rows);
      }
      for_gradients<T>(a, t, tile, by, static_cast<T*>(nullptr), apply);
    });
  });
  return 0;
}

int update_cpu(const Update& a, void*) {
  const double batches = a.batches ? double(++*a.batches) : 0;
  if (a.elements == 0) return 0;
  const double momentum = a.cumulative ? 1 / batches : a.momentum;
  dispatch(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T *const mean = static_cast<T*>(a.running_mean), *const variance = static_cast<T*>(a.running_var);
    const T* const offset = static_cast<const T*>(a.offset);
    for (int64_t c = 0; c < a.channels; ++c) {
      const double batch_mean = a.stats[c] + (offset ? double(widen(offset[c])) : 0);
      const double batch_var = a.stats[a.channels + c] * (a.elements / (a.elements - 1));
      mean[c] = narrow<T>(Compute<T>(moving_average(widen(mean[c]), batch_mean, momentum)));
      variance[c] = narrow<T>(Compute<T>(moving_average(widen(variance[c]), batch_var, momentum)));
    }
  });
  return 0;
}

}  // namespace gdbp::norm
