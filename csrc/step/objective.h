// The losses of a training step: the launchers of their families over buffers of an Arena.
#pragma once
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <memory>

#include "common/dtype.h"
#include "step/arena.h"

namespace gdbp::step {

// The network's output as the loss sees it: (rows, cols), of these sizes.
struct Output {
  Dtype dtype;
  int64_t rows, cols;
  at::DimVector sizes;

  int64_t numel() const { return rows * cols; }
};

// The target of the same rows, contiguous.
struct Target {
  const void* data;
  at::ScalarType type;
  at::DimVector sizes;
};

class Objective {
 public:
  virtual ~Objective() = default;
  // Raises an error where the target does not fit; it has no data yet.
  virtual void check(const Output& output, const Target& target) const = 0;
  // The same of the labels of `count` rows of a data set, those of `index`, or the first ones for null: which of them
  // raised it would be hard to find later.
  virtual void check_labels(const int64_t*, const int64_t* /*index*/, int64_t /*count*/, int64_t /*classes*/) const {}
  // Buffers of its own, used at `time`.
  virtual void plan(const Output& output, Arena& arena, int time) = 0;
  // The loss into *value, and its gradient into `grad`, which may be `output` itself; null for none. Both of the
  // output's dtype. Raises an error for a label out of range.
  virtual void run(const Output& shape, const void* output, const Target& target, const Arena& arena, void* value,
                   void* grad) = 0;
};

// description: the loss's name, then its options; see gdbp/step/_loss.py.
std::unique_ptr<Objective> make_objective(const pybind11::tuple& description);

}  // namespace gdbp::step
