// The tensors of one optimizer step, on their way to the launchers: one dense line of elements each.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "optim/optim.h"

namespace gdbp::optim {

// Checks and collects; nothing is changed before run(). Kept between steps for its memory alone.
class Batch {
 public:
  // states: rule_states(rule) tensors of the parameter's shape. step: 1 for the first update.
  void add(int rule, const at::Tensor& param, const at::Tensor& grad, const at::Tensor* states, double step);
  // One launch a device; then repaired layouts are copied back and version counters bumped.
  void run(int rule, const Hyper& hyper);
  void clear();

 private:
  struct Lane {
    at::Device device;
    std::vector<Slot> slots;
  };
  struct Copy {
    at::Tensor to, from;
  };
  void add_dense(int rule, const at::Tensor& param, const at::Tensor& grad, const at::Tensor* states, double step);

  std::vector<Lane> lanes_;
  std::vector<at::Tensor> temporaries_;
  std::vector<Copy> copies_;
  std::vector<c10::TensorImpl*> written_;
};

int parse_rule(c10::string_view name);
// From the flat list in the order of Hyper's fields.
Hyper parse_hyper(const double* values, size_t count);

}  // namespace gdbp::optim
