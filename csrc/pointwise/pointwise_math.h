// Losses of single elements: one struct each. All are functions of the difference d = input - target, so the
// gradient of the target is minus that of the input. forward: the loss; backward: its derivative in d. NaN
// gives NaN in both. Each takes one parameter, which is above 0 where it is used.
#pragma once
#include "common/math.h"

namespace gdbp::pointwise {

struct SquaredError {
  static constexpr bool uses_parameter = false;
  template <class T>
  static GDBP_HD T forward(T d, T) {
    return d * d;
  }
  template <class T>
  static GDBP_HD T backward(T d, T) {
    return T(2) * d;
  }
};

struct AbsoluteError {
  static constexpr bool uses_parameter = false;
  template <class T>
  static GDBP_HD T forward(T d, T) {
    return math::abs(d);
  }
  template <class T>
  static GDBP_HD T backward(T d, T) {
    return d > T(0) ? T(1) : d < T(0) ? T(-1) : d;
  }
};

// Huber (1964): d^2 / 2 up to delta > 0, a line of slope delta beyond. With |d| clamped to c both are one
// expression.
struct Huber {
  static constexpr bool uses_parameter = true;
  template <class T>
  static GDBP_HD T forward(T d, T delta) {
    const T size = math::abs(d), c = math::at_most(size, delta);
    return c * (size - T(0.5) * c);
  }
  template <class T>
  static GDBP_HD T backward(T d, T delta) {
    return math::at_most(math::at_least(d, -delta), delta);
  }
};

// Huber's over beta (Girshick, 2015): |d| with the tip rounded off, beta > 0.
struct SmoothL1 {
  static constexpr bool uses_parameter = true;
  template <class T>
  static GDBP_HD T forward(T d, T beta) {
    const T size = math::abs(d), c = math::at_most(size, beta);
    return c / beta * (size - T(0.5) * c);
  }
  template <class T>
  static GDBP_HD T backward(T d, T beta) {
    return Huber::backward(d, beta) / beta;
  }
};

// The table: each loss's name in Python, and its struct. A new loss is a struct and a row.
#define GDBP_POINTWISE_LOSSES(ROW) \
  ROW(mse_loss, SquaredError)      \
  ROW(l1_loss, AbsoluteError)      \
  ROW(huber_loss, Huber)           \
  ROW(smooth_l1_loss, SmoothL1)

#define GDBP_ROW(name, Op) name,
enum class Kind : int { GDBP_POINTWISE_LOSSES(GDBP_ROW) };
#undef GDBP_ROW
#define GDBP_ROW(name, Op) Kind::name,
constexpr Kind kKinds[] = {GDBP_POINTWISE_LOSSES(GDBP_ROW)};
#undef GDBP_ROW
#define GDBP_ROW(name, Op) #name,
constexpr const char* kKindNames[] = {GDBP_POINTWISE_LOSSES(GDBP_ROW)};
#undef GDBP_ROW

// Calls f(Op{}) with the loss's struct.
template <class F>
auto dispatch(Kind kind, F&& f) {
  switch (kind) {
#define GDBP_ROW(name, Op) \
  case Kind::name: return f(Op{});
    GDBP_POINTWISE_LOSSES(GDBP_ROW)
#undef GDBP_ROW
  }
  return f(SquaredError{});
}

}  // namespace gdbp::pointwise
