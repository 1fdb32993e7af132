// What is summed over gradients, and what the sum decides.
#pragma once
#include <cmath>

#include "common/dtype.h"
#include "grad/grad.h"

namespace gdbp::grad {

// Squares are taken in double: in float, and more so in half types, they overflow or vanish long before
// the norm itself does.
template <class T>
GDBP_HD double square(T stored) {
  const double x = double(widen(stored));
  return x * x;
}

// torch's clip_grad_norm_: max_norm / (total + 1e-6), never above 1. NaN and infinity pass, unless they are
// to stop the step.
GDBP_HD Norm decide(double sum_of_squares, const Limit& limit) {
  Norm norm;
  norm.total = sqrt(sum_of_squares) * limit.scale;
  const double ratio = limit.max_norm / (norm.total + 1e-6);
  // Without a limit there is no ratio: of two infinities it would be NaN.
  norm.coefficient = limit.max_norm > 1.7976931348623157e308 || ratio > 1 ? limit.scale : limit.scale * ratio;
  norm.skip = limit.skip_nonfinite != 0 && !(norm.total <= 1.7976931348623157e308) ? 1 : 0;
  return norm;
}

}  // namespace gdbp::grad
