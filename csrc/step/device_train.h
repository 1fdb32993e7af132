// A training step of a narrow dense network on CUDA: what gdbp.TrainStep runs there. One launch takes the rows through
// forward, loss and backward (csrc/mlp), one sums the gradients and updates the parameters (csrc/optim).
#pragma once
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "mlp/mlp.h"
#include "step/plan.h"
#include "step/watched.h"

namespace gdbp::step {

class DeviceTrainPlan {
 public:
  // layers, objective: descriptions from gdbp/step. Raises a ValueError that says why the kernels don't take the model.
  DeviceTrainPlan(const pybind11::list& layers, const pybind11::tuple& objective, Watched watched, bool flattens);

  bool unchanged() const { return watched_.unchanged(); }
  // Whether the network fits into a block, with factors of products as mlp::kFactorNames calls them.
  bool fits(const std::string& factors) const;
  // Readies the optimizer's tensors; false where it needs another StepPlan. keep: whether gradients go to .grad.
  bool collect(StepPlan& plan, const std::vector<Group>& groups, const pybind11::dict& state, bool keep);
  // The step that was readied. factors: see fits(). limit: of the norm of all gradients, and whether a step is skipped
  // where it is not finite. Returns the loss, float32, and the three numbers of grad::Norm or None. Nothing waits for
  // the device.
  pybind11::tuple step(StepPlan& plan, const at::Tensor& input, const at::Tensor& target, const std::string& factors,
                       const std::optional<std::pair<double, bool>>& limit);
  int64_t completed() { return std::exchange(completed_, 0); }
  // (rows, bytes, bytes) of the last step, see TrainPlan.
  std::tuple<int64_t, int64_t, int64_t> memory() const;

 private:
  void check(const at::Tensor& input, const at::Tensor& target) const;
  void ready(int64_t rows);
  void look_up_parameters();
  // Where a parameter's gradient begins among those of all.
  int64_t& gradient_at(size_t parameter);
  bool can_sum(StepPlan& plan) const;
  void use_parts(StepPlan& plan);
  void use_sums(StepPlan& plan);

  const Watched watched_;
  const bool flattens_;
  mlp::Network network_{};
  mlp::Objective objective_;
  bool mean_ = true;
  int64_t ignore_index_ = -100;
  at::Device device_;
  std::vector<at::Tensor> parameters_;  // weight, bias, weight, ...; undefined for none
  std::vector<int> entries_;            // in the StepPlan; -1: the optimizer does not have it
  std::vector<char> trained_, in_plan_;
  bool keep_ = false;
  int64_t gradients_ = 0, rows_ = 0, blocks_ = 0, completed_ = 0;
  int shared_bytes_ = 0;
  uint64_t found_in_ = 0;
  void* stream_ = nullptr;  // of the last step, whose memory must not be written from another
  at::Tensor partials_, findings_, sums_;
  at::Tensor decided_;  // 0, coefficient, skip: as grad::Norm
};

void bind_device_train(pybind11::module_& module);

}  // namespace gdbp::step
