// What is counted of the outputs of one unit (a column).
#pragma once
#include "common/macros.h"

namespace gdbp::units {

struct Tally {
  double flat;  // outputs where the activation's curve is flat: up to `low`, or from `high` on
  double sum, squares;

  GDBP_HD void add(double y, double low, double high) {
    // A NaN is neither.
    flat += (y <= low || y >= high) ? 1.0 : 0.0;
    sum += y;
    squares += y * y;
  }
  GDBP_HD void add(const Tally& other) {
    flat += other.flat;
    sum += other.sum;
    squares += other.squares;
  }
};

}  // namespace gdbp::units
