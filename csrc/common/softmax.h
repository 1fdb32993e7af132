// A row's softmax, from two numbers that keep all of its digits.
#pragma once
#include "common/math.h"

namespace gdbp {

// m is the largest logit, `others` the sum of exp(x - m) over the others. Forming it directly, and not as the whole sum
// less 1, keeps all digits where the row is confident. C: float or double.
template <class C>
struct Softmax {
  C m, others;

  GDBP_HD C inverse() const { return C(1) / (C(1) + others); }
  GDBP_HD C log_total() const { return math::log1p(others); }
  // of the logits as they are: what z_loss squares
  GDBP_HD C log_sum_exp() const { return m + log_total(); }
  GDBP_HD C p(C x) const { return math::exp(x - m) * inverse(); }
  // 1 - p
  GDBP_HD C rest(C x) const { return x == m ? others * inverse() : C(1) - p(x); }
  // -log p
  GDBP_HD C nll(C x) const { return log_total() - (x - m); }
};

}  // namespace gdbp
