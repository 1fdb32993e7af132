#include "common/map_cpu.h"
#include "common/reduce_cpu.h"
#include "pointwise/pointwise.h"

namespace gdbp::pointwise {
namespace {

template <class T, class Op>
void forward(const Forward& a) {
  using C = Compute<T>;
  const T* const input = static_cast<const T*>(a.input);
  const T* const target = static_cast<const T*>(a.target);
  T* const output = static_cast<T*>(a.output);
  const C parameter = C(a.parameter);
  const auto loss = [=](int64_t i) __attribute__((always_inline)) {
    return Op::forward(widen(input[i]) - widen(target[i]), parameter);
  };
  if (a.reduction == Reduction::none) {
    cpu::map(a.numel, [=](int64_t i) __attribute__((always_inline)) { output[i] = narrow<T>(loss(i)); });
    return;
  }
  T* const grad_input = static_cast<T*>(a.grad_input);
  const C factor = C(a.reduction == Reduction::mean ? 1 / double(a.numel) : 1);
  const auto both = [=](int64_t i) __attribute__((always_inline)) {
    const C d = widen(input[i]) - widen(target[i]);
    grad_input[i] = narrow<T>(factor * Op::backward(d, parameter));
    return Op::forward(d, parameter);
  };
  double* const sums = static_cast<double*>(a.workspace);
  double total =
      grad_input ? cpu::tiled_sum<C>(a.numel, kTile, sums, both) : cpu::tiled_sum<C>(a.numel, kTile, sums, loss);
  if (a.reduction == Reduction::mean) total /= double(a.numel);
  output[0] = narrow<T>(C(total));
}

template <class T, class Op>
void backward(const Backward& a) {
  using C = Compute<T>;
  const T* const grad_output = static_cast<const T*>(a.grad_output);
  const T* const input = static_cast<const T*>(a.input);
  const T* const target = static_cast<const T*>(a.target);
  T* const grad_input = static_cast<T*>(a.grad_input);
  T* const grad_target = static_cast<T*>(a.grad_target);
  const C parameter = C(a.parameter);
  const bool none = a.reduction == Reduction::none;
  const double scale = none || a.numel == 0 ? 1 : double(widen(grad_output[0]));
  const C factor = C(a.reduction == Reduction::mean ? scale / double(a.numel) : scale);
  cpu::map(a.numel, [=](int64_t i) __attribute__((always_inline)) {
    const C slope = Op::backward(widen(input[i]) - widen(target[i]), parameter);
    const C g = (none ? widen(grad_output[i]) : factor) * slope;
    if (grad_input) grad_input[i] = narrow<T>(g);
    if (grad_target) grad_target[i] = narrow<T>(-g);
  });
}

// Calls f with the element type and the loss as types.
template <class F>
int dispatch_both(const Loss& loss, const F& f) {
  gdbp::dispatch(loss.dtype, [&](auto type) { dispatch(loss.kind, [&](auto op) { f(type, op); }); });
  return 0;
}

}  // namespace

int forward_cpu(const Forward& a, void*) {
  return dispatch_both(a, [&](auto type, auto op) { forward<typename decltype(type)::type, decltype(op)>(a); });
}

int backward_cpu(const Backward& a, void*) {
  return dispatch_both(a, [&](auto type, auto op) { backward<typename decltype(type)::type, decltype(op)>(a); });
}

}  // namespace gdbp::pointwise
