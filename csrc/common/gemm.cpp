#include "common/gemm.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cstring>

// MKL, which torch's library for x86 exports. At 64 x 64 x 32 a call through at::mm_out costs as much again as the
// product itself. Weak: another build of torch may lack them.
extern "C" {
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
                                  const float*, const int*, const float*, const int*, const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
                                  const double*, const int*, const double*, const int*, const double*, double*,
                                  const int*);
// Without it MKL would choose the number of threads, and with it the order of the sums.
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int);
}

namespace gdbp {
namespace {

bool blas_allowed = true;

bool has_blas() { return blas_allowed && sgemm_ && dgemm_ && MKL_Set_Num_Threads_Local; }

class OneThread {
 public:
  OneThread() : before_(MKL_Set_Num_Threads_Local(1)) {}
  ~OneThread() { MKL_Set_Num_Threads_Local(before_); }

 private:
  int before_;
};

// Column-major BLAS sees row-major matrices transposed: out^T = b^T a^T.
template <class T, class Blas>
void call(Blas* blas, int64_t m, int64_t n, int64_t k, const Operand& a, const Operand& b, void* out, int64_t stride) {
  const OneThread one_thread;
  const int rows = int(m), cols = int(n), inner = int(k), a_stride = int(a.stride), b_stride = int(b.stride),
            out_stride = int(stride);
  const T one = 1, zero = 0;
  blas(b.transposed ? "T" : "N", a.transposed ? "T" : "N", &cols, &rows, &inner, &one, static_cast<const T*>(b.data),
       &b_stride, static_cast<const T*>(a.data), &a_stride, &zero, static_cast<T*>(out), &out_stride);
}

at::Tensor view(const Operand& x, int64_t rows, int64_t cols, at::ScalarType type) {
  const auto data = const_cast<void*>(x.data);
  return x.transposed ? at::from_blob(data, {rows, cols}, {1, x.stride}, at::TensorOptions(type))
                      : at::from_blob(data, {rows, cols}, {x.stride, 1}, at::TensorOptions(type));
}

// Below this a piece costs more to hand to a thread than to compute: 4 million multiplications and additions are some
// 40 us, a fork and join of two threads some 5.
constexpr int64_t kTileWork = 4'000'000;
// Each piece packs the other operand again, an element of which costs as much as some 50 of the product's operations:
// one more piece for each so many rows is 10 % of the time at worst.
constexpr int64_t kRowsForAPiece = 400;
constexpr int64_t kLeastTiles = 2;
// Pieces begin at multiples of it, so that the kernels inside see whole blocks.
constexpr int64_t kTileStep = 16;

}  // namespace

void gemm(Dtype dtype, int64_t m, int64_t n, int64_t k, const Operand& a, const Operand& b, void* out,
          int64_t out_stride) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    for (int64_t row = 0; row < m; ++row)
      std::memset(static_cast<char*>(out) + row * out_stride * size_of(dtype), 0, size_t(n * size_of(dtype)));
    return;
  }
  if (has_blas()) {
    if (dtype == Dtype::float64) return call<double>(dgemm_, m, n, k, a, b, out, out_stride);
    return call<float>(sgemm_, m, n, k, a, b, out, out_stride);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::ScalarType type = dtype == Dtype::float64 ? at::kDouble : at::kFloat;
  at::Tensor to = view({out, out_stride}, m, n, type);
  at::mm_out(to, view(a, m, k, type), view(b, k, n, type));
}

bool gemm_is_faster(Dtype dtype, int64_t m, int64_t n, int64_t k) {
  return (dtype == Dtype::float32 || dtype == Dtype::float64) && 2 * m * n * k < kTileWork && has_blas();
}

int64_t gemm_tiles(int64_t m, int64_t n, int64_t k) {
  const int64_t wanted = std::min(2 * m * n * k / kTileWork, std::max(kLeastTiles, 1 + m / kRowsForAPiece));
  const int64_t possible = m / kTileStep;
  int64_t tiles = 1;
  while (2 * tiles <= std::min(wanted, possible)) tiles *= 2;
  return tiles;
}

int64_t gemm_tile_start(int64_t m, int64_t tiles, int64_t tile) {
  const int64_t steps = (m + kTileStep - 1) / kTileStep;
  return std::min(m, steps * tile / tiles * kTileStep);
}

int64_t gemm_tile_rows(int64_t m, int64_t tiles) {
  const int64_t steps = (m + kTileStep - 1) / kTileStep;
  return (steps + tiles - 1) / tiles * kTileStep;
}

void allow_blas(bool allowed) { blas_allowed = allowed; }

const char* gemm_name() { return has_blas() ? "sgemm" : "at::mm"; }

}  // namespace gdbp
