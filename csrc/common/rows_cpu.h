// Blocks of rows on the CPU: between the types that are stored and those that are computed with, and through the
// activations. What a family does to an element before and after that is a loop of its own, over a block that stays in
// the first-level cache: every loop is compiled for few types instead of for all their combinations.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/activations.h"
#include "common/dtype.h"

namespace gdbp::cpu {

// Elements of a block. Where a stored type is not the compute type, they pass through buffers of this size.
constexpr int64_t kBlock = 2048;
inline int64_t block_rows(int64_t rows, int64_t cols) { return std::clamp<int64_t>(kBlock / cols, 1, rows); }

// Whether T is computed with as it is stored: then nothing has to pass through a buffer.
template <class T>
constexpr bool kDirect = std::is_same_v<T, Compute<T>>;

// Rows that lie `step` elements apart.
template <class T>
struct Rows {
  T* at;
  int64_t step;

  GDBP_HD T* operator[](int64_t row) const { return at + row * step; }
  operator Rows<const T>() const { return {at, step}; }
};

template <class T>
GDBP_CLONES void widen_rows(Rows<const T> from, Rows<Compute<T>> to, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* const x = from[row];
    Compute<T>* const y = to[row];
#pragma GCC ivdep
    for (int64_t col = 0; col < cols; ++col) y[col] = widen(x[col]);
  }
}

template <class T>
GDBP_CLONES void narrow_rows(Rows<const Compute<T>> from, Rows<T> to, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const Compute<T>* const x = from[row];
    T* const y = to[row];
#pragma GCC ivdep
    for (int64_t col = 0; col < cols; ++col) y[col] = narrow<T>(x[col]);
  }
}

// y = activation(z), for C float and double; y may be z.
template <class C>
void activate(Activation activation, Rows<const C> z, Rows<C> y, int64_t rows, int64_t cols);
// The gradient of z from g, that of y, and from what saves(activation) says; out may be g or saved.
template <class C>
void activate_backward(Activation activation, Rows<const C> g, Rows<const C> saved, Rows<C> out, int64_t rows,
                       int64_t cols);

}  // namespace gdbp::cpu
