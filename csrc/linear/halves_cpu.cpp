#include <algorithm>

#include "common/map_cpu.h"
#include "common/rows_cpu.h"
#include "linear/linear.h"

namespace gdbp::linear {
namespace {

using cpu::Rows;

template <class T>
GDBP_CLONES void narrow_sums(Rows<const float> sums, const T* bias, Rows<T> to, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* const x = sums[row];
    T* const y = to[row];
#pragma GCC ivdep
    for (int64_t col = 0; col < cols; ++col) y[col] = narrow<T>(x[col] + widen(bias[col]));
  }
}

template <class Half>
void for_half(Dtype dtype, Half&& half) {
  if (dtype == Dtype::bfloat16) {
    half(Type<BFloat16>{});
  } else {
    half(Type<Float16>{});
  }
}

template <class F>
void for_rows(int64_t rows, int64_t cols, const F& f) {
  if (rows && cols) parallel_for(0, rows, std::max<int64_t>(1, cpu::kGrain / cols), f);
}

}  // namespace

int widen_cpu(const Widen& a, void*) {
  for_half(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_rows(a.rows, a.cols, [&](int64_t lo, int64_t hi) {
      const Rows<const T> from{static_cast<const T*>(a.halves) + lo * a.stride, a.stride};
      cpu::widen_rows<T>(from, {a.floats + lo * a.cols, a.cols}, hi - lo, a.cols);
    });
  });
  return 0;
}

int narrow_cpu(const Narrow& a, void*) {
  for_half(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_rows(a.rows, a.cols, [&](int64_t lo, int64_t hi) {
      const Rows<const float> sums{a.sums + lo * a.cols, a.cols};
      const Rows<T> to{static_cast<T*>(a.halves) + lo * a.stride, a.stride};
      if (a.bias) {
        narrow_sums<T>(sums, static_cast<const T*>(a.bias), to, hi - lo, a.cols);
      } else {
        cpu::narrow_rows<T>(sums, to, hi - lo, a.cols);
      }
    });
  });
  return 0;
}

}  // namespace gdbp::linear
