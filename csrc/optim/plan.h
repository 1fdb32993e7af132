// A parameter group as C++ sees it, so that a step costs nanoseconds a tensor and not microseconds.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "optim/batch.h"

namespace gdbp::optim {

// Remembers which tensors make up a group and its states; believes nothing it has not looked at again in
// this step. Python owns everything: the plan only holds on to it.
class StepPlan {
 public:
  // params: group["params"]; state: optimizer.state; keys: the rule's states in order, by name;
  // fresh: positions of parameters whose first update this will be, for rules that keep no step count.
  StepPlan(const std::string& rule, const pybind11::list& params, const pybind11::dict& state,
           const std::vector<std::string>& keys, bool counts_steps, const std::vector<int64_t>& fresh);

  // Updates every parameter that has a gradient. Returns false, and changes nothing, where the group or
  // the state is not what it was when the plan was made, or a gradient has come to a parameter without state.
  bool step(const pybind11::list& params, const pybind11::dict& state, const std::string& rule,
            const std::vector<double>& hyper);

 private:
  struct Entry {
    at::Tensor param;
    at::Tensor states[kMaxStates];
    at::Tensor step;
    pybind11::object param_object, state_dict;
    pybind11::object state_objects[kMaxStates + 1];
    bool ready = false;
    bool fresh = false;
  };
  bool unchanged(const pybind11::list& params, const pybind11::dict& state) const;
  bool unchanged(const Entry& entry) const;

  std::string rule_name_;
  int rule_;
  bool counts_steps_;
  std::vector<pybind11::str> keys_;
  std::vector<Entry> entries_;
  pybind11::object state_object_;
  std::vector<pybind11::object> state_dicts_;
  Batch batch_;
  std::vector<Entry*> stepped_;
};

void bind_step_plan(pybind11::module_& module);

}  // namespace gdbp::optim
