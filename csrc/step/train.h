// A model, its loss and its optimizer as one call: what gdbp.TrainStep runs.
#pragma once
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "step/network.h"
#include "step/plan.h"
#include "step/watched.h"

namespace gdbp::step {

class TrainPlan {
 public:
  // layers, objective: descriptions from gdbp/step. flattens: whether a first Flatten joins all dimensions but the
  // first; output_dims: see Network::plan.
  TrainPlan(const pybind11::list& layers, const pybind11::tuple& objective, Watched watched, bool flattens,
            int output_dims);

  // Whether the model is still the one that this was made of.
  bool unchanged() const { return watched_.unchanged(); }
  // Readies the optimizer's tensors; false where it needs another StepPlan. Raises an error where a tensor is not what
  // the kernels take.
  bool collect(StepPlan& plan, const std::vector<Group>& groups, const pybind11::dict& state,
               const Updates::Options& options);
  // The step that was readied. limit: what the norm decides, where the updates wait. seed: of the run; number: of the
  // step, for dropout. Returns the loss, the three numbers of grad::Norm or None, and whether parameters were updated.
  using Limit = std::optional<std::pair<double, bool>>;  // max_norm, skip_nonfinite
  pybind11::tuple step(StepPlan& plan, const at::Tensor& input, const at::Tensor& target, const Limit& limit,
                       uint64_t seed, uint64_t number);
  // The same for steps of `size` rows each of a data set, the last with what is left, in the order of `index`, or as
  // they lie where it is undefined. The results have one row for each step; first: the number of the first.
  pybind11::tuple many(StepPlan& plan, const at::Tensor& inputs, const at::Tensor& targets, const at::Tensor& index,
                       int64_t size, const Limit& limit, uint64_t seed, uint64_t first);

  // step() in two parts, between which the gradients, in one piece, may be reduced: returns the loss and the gradients;
  // then what step() returns after the loss. collect() has to be told so.
  std::pair<at::Tensor, at::Tensor> backward(const at::Tensor& input, const at::Tensor& target, uint64_t seed,
                                             uint64_t number);
  pybind11::tuple update(StepPlan& plan, const Limit& limit);

  // How many steps were completed since this was last asked, also where an error came after them.
  int64_t completed() { return std::exchange(completed_, 0); }

  // (rows, bytes, bytes without sharing) of the memory in use, zeros before the first step.
  std::tuple<int64_t, int64_t, int64_t> memory() const;

 private:
  // Checks what comes in, and lays out the memory if need be. rows: of the input, if not all of them.
  void ready(const at::Tensor& input, int64_t rows, const Target& target);
  // The loss of one batch. Once its gradients are there, and while no Python runs, `then` is called.
  template <class Then>
  at::Tensor run(const at::Tensor& input, const at::Tensor& target, uint64_t seed, uint64_t number, const Then& then);
  // The updates that had to wait, if there are any; false where the step does not count.
  bool finish(bool waits, const Limit& limit, grad::Norm* norm);

  const Watched watched_;
  const bool flattens_;
  const int output_dims_;
  Network network_;
  bool replan_ = true;
  int64_t completed_ = 0;
  at::Tensor gathered_[2];  // rows of inputs and targets
};

void bind_train(pybind11::module_& module);

}  // namespace gdbp::step
