// Losses of whole rows: the arithmetic of one row. T is float, or double for float64.
#pragma once
#include "common/math.h"

namespace gdbp::loss {

// Softmax cross-entropy of one row, from the statistics that a pass over it leaves: with m the largest
// logit, own = exp(x_y - m) for the target y, and others = the sum of exp(x_j - m) over j != y.
// Forming others directly, and not as 1 - own / total, keeps all digits where the row is confident:
//   loss      = log(total) - (x_y - m), which is log1p(others) where the target leads
//   dloss/x_y = -others / total
template <class T>
struct Row {
  T m, own, others, shift;  // shift = x_y - m

  GDBP_HD Row(T max_logit, T target_logit, T sum_of_others)
      : m(max_logit),
        own(math::exp(target_logit - max_logit)),
        others(sum_of_others),
        shift(target_logit - max_logit) {}
  GDBP_HD T total() const { return own + others; }
  // log of the sum of exp(x_j - m), which label smoothing needs. own is above others only where it is 1.
  GDBP_HD T log_total() const { return own > others ? math::log1p(others) : math::log(total()); }
  // -log softmax(x)_y
  GDBP_HD T nll() const { return log_total() - shift; }
};

}  // namespace gdbp::loss
