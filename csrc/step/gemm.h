// Matrix products of a training step: row-major, into memory that is there, and the same bits for any number
// of threads.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace gdbp::step {

// A row-major matrix, `stride` elements from row to row, or its transpose.
struct Operand {
  const void* data;
  int64_t stride;
  bool transposed = false;

  // From row `row` (of the transpose, where it is one) on.
  Operand from_row(int64_t row, Dtype dtype) const {
    return {static_cast<const char*>(data) + row * (transposed ? 1 : stride) * size_of(dtype), stride, transposed};
  }
};

// out (m, n) = a (m, k) b (k, n), for float32 and float64; 0 where k is 0. On the calling thread alone.
void gemm(Dtype dtype, int64_t m, int64_t n, int64_t k, const Operand& a, const Operand& b, void* out,
          int64_t out_stride);

// The same on all threads, where that pays.
void parallel_gemm(Dtype dtype, int64_t m, int64_t n, int64_t k, const Operand& a, const Operand& b, void* out,
                   int64_t out_stride);

// Into how many pieces a product of m rows is cut: a function of its size alone, which makes the results so, too.
int64_t gemm_tiles(int64_t m, int64_t n, int64_t k);
// The first row of a piece; for piece == pieces: the number of rows.
int64_t gemm_tile_start(int64_t m, int64_t tiles, int64_t tile);
// No piece has more rows.
int64_t gemm_tile_rows(int64_t m, int64_t tiles);

// "sgemm" where the BLAS in torch's library can be called directly, else "at::mm".
const char* gemm_name();

}  // namespace gdbp::step
