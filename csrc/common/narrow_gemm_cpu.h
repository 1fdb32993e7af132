// Matrix products whose right side stays in the cache: the layers of narrow networks, block of rows by block of rows. A
// BLAS copies its operands into an order of its own first, which pays for large products; here that is done once a
// step, by pack_transposed(), or not at all.
#pragma once
#include <algorithm>
#include <cstdint>

namespace gdbp::cpu {

constexpr int64_t kVectorBytes = 64;

// A row of `width` elements, padded to whole vectors.
template <class T>
constexpr int64_t padded(int64_t width) {
  constexpr int64_t lanes = kVectorBytes / int64_t(sizeof(T));
  return (width + lanes - 1) / lanes * lanes;
}

// The right side of a product, (k, n): rows are read in whole vectors, so behind each there must be something to read,
// kVectorBytes at most. Where nobody promises that of the last ones, these lie elsewhere.
template <class T>
struct Right {
  const T* data;
  int64_t stride;
  const T* last = nullptr;  // the rows from `split` on, of the same stride
  int64_t split = INT64_MAX;

  // The first of k rows of so many elements, stride == width, behind which there may be nothing.
  static int64_t split_of(int64_t k, int64_t width) {
    const int64_t beyond = padded<T>(width) - width;
    return beyond == 0 ? k : std::max<int64_t>(0, k - (beyond + width - 1) / width);
  }
};

// c (m, n) = a (m, k) b (k, n), or where it `adds` what c held and that; + bias. On the calling thread. Each element is
// summed over k in order, whatever the rows around it.
template <class T>
struct Product {
  int64_t m, n, k;
  const T* a;  // element (i, p) at a[i * a_row + p * a_col]
  int64_t a_row, a_col;
  Right<T> b;
  T* c;
  int64_t c_stride;
  const T* bias = nullptr;  // (padded(n))
  bool adds = false;
};

template <class T>
void narrow_gemm(const Product<T>& product);

// For a few rows: c (m, n) = a (m, k) b^T + bias, all of them contiguous, b (n, k). Each element is summed in the lanes
// of a vector.
template <class T>
void narrow_dots(int64_t m, int64_t n, int64_t k, const T* a, const T* b, const T* bias, T* c);

// to (cols, padded(rows)) = from (rows, cols) transposed, 0 where it is padded; rows of `from` are `stride` apart.
template <class T>
void pack_transposed(const T* from, int64_t rows, int64_t cols, int64_t stride, T* to);

}  // namespace gdbp::cpu
