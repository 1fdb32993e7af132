// Matrix products without a library's threads: row-major, into memory that is there, and the same bits for any number
// of threads.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/parallel.h"

namespace gdbp {

// A row-major matrix, `stride` elements from row to row, or its transpose.
struct Operand {
  const void* data;
  int64_t stride;
  bool transposed = false;

  // From a row, or a column, on; of the transpose, where it is one.
  Operand from_row(int64_t row, Dtype dtype) const { return from(transposed ? row : row * stride, dtype); }
  Operand from_col(int64_t col, Dtype dtype) const { return from(transposed ? col * stride : col, dtype); }

 private:
  Operand from(int64_t element, Dtype dtype) const {
    return {static_cast<const char*>(data) + element * size_of(dtype), stride, transposed};
  }
};

// out (m, n) = a (m, k) b (k, n), for float32 and float64; 0 where k is 0. On the calling thread alone.
void gemm(Dtype dtype, int64_t m, int64_t n, int64_t k, const Operand& a, const Operand& b, void* out,
          int64_t out_stride);

// Whether gemm() takes less time than at::mm would: the product is small, and computed by a BLAS called directly.
bool gemm_is_faster(Dtype dtype, int64_t m, int64_t n, int64_t k);

// Into how many pieces a product of m rows is cut: a function of its size alone, which makes the results so, too.
int64_t gemm_tiles(int64_t m, int64_t n, int64_t k);
// The first row of a piece; for piece == pieces: the number of rows.
int64_t gemm_tile_start(int64_t m, int64_t tiles, int64_t tile);
// No piece has more rows.
int64_t gemm_tile_rows(int64_t m, int64_t tiles);

// gemm() on all threads, where that pays; after(first, last) is called for each piece of finished rows.
template <class After>
void parallel_gemm(Dtype dtype, int64_t m, int64_t n, int64_t k, const Operand& a, const Operand& b, void* out,
                   int64_t out_stride, const After& after) {
  const auto at = [&](int64_t elements) { return static_cast<char*>(out) + elements * size_of(dtype); };
  // Cut along the longer side: the other operand is read, and packed, once for each piece.
  if (m >= n) {
    const int64_t tiles = gemm_tiles(m, n, k);
    parallel_for(0, tiles, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t tile = lo; tile < hi; ++tile) {
        const int64_t begin = gemm_tile_start(m, tiles, tile), end = gemm_tile_start(m, tiles, tile + 1);
        gemm(dtype, end - begin, n, k, a.from_row(begin, dtype), b, at(begin * out_stride), out_stride);
        after(begin, end);
      }
    });
    return;
  }
  const int64_t tiles = gemm_tiles(n, m, k);
  parallel_for(0, tiles, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t tile = lo; tile < hi; ++tile) {
      const int64_t begin = gemm_tile_start(n, tiles, tile), end = gemm_tile_start(n, tiles, tile + 1);
      gemm(dtype, m, end - begin, k, a, b.from_col(begin, dtype), at(begin), out_stride);
    }
  });
  after(int64_t(0), m);
}

// "sgemm" where the BLAS in torch's library can be called directly, else "at::mm".
const char* gemm_name();
// For tests of what runs where it can't.
void allow_blas(bool allowed);

}  // namespace gdbp
