#include "common/rows_cpu.h"

namespace gdbp::cpu {
namespace {

template <class Op, class C>
GDBP_CLONES void forward(Rows<const C> in, Rows<C> out, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const C* const z = in[row];
    C* const y = out[row];
#pragma GCC ivdep
    for (int64_t col = 0; col < cols; ++col) y[col] = Op::forward(z[col]);
  }
}

template <class Op, class C>
GDBP_CLONES void backward(Rows<const C> grads, Rows<const C> saved, Rows<C> out, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const C* const g = grads[row];
    const C* const s = saved[row];
    C* const y = out[row];
#pragma GCC ivdep
    for (int64_t col = 0; col < cols; ++col) y[col] = Op::backward(g[col], s[col]);
  }
}

}  // namespace

template <class C>
void activate(Activation activation, Rows<const C> z, Rows<C> y, int64_t rows, int64_t cols) {
  dispatch(activation, [&](auto op) { forward<decltype(op), C>(z, y, rows, cols); });
}
template <class C>
void activate_backward(Activation activation, Rows<const C> g, Rows<const C> saved, Rows<C> out, int64_t rows,
                       int64_t cols) {
  dispatch(activation, [&](auto op) { backward<decltype(op), C>(g, saved, out, rows, cols); });
}

template void activate(Activation, Rows<const float>, Rows<float>, int64_t, int64_t);
template void activate(Activation, Rows<const double>, Rows<double>, int64_t, int64_t);
template void activate_backward(Activation, Rows<const float>, Rows<const float>, Rows<float>, int64_t, int64_t);
template void activate_backward(Activation, Rows<const double>, Rows<const double>, Rows<double>, int64_t, int64_t);

}  // namespace gdbp::cpu
