// Launchers of the optim family: one update rule applied to many tensors in one parallel region (CPU) or
// one launch per batch of tensors (CUDA). Plain pointers, the same signature on CPU and CUDA; each
// returns 0, or the cudaError of the launch.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "optim/optim_math.h"

namespace gdbp::optim {

// One parameter with its gradient and states: numel elements each, in the same dense order. Every array
// has a type of its own; arithmetic is in double where the parameter is float64, else in float.
struct Slot {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  int64_t numel;
  double step;  // number of this update for this parameter, 1 for the first
  Dtype param_dtype, grad_dtype, state_dtype;
};

// The row of `name` in GDBP_OPTIM_RULES, or -1.
int find_rule(const char* name);
int rule_states(int rule);

int step_cpu(int rule, const Hyper& hyper, const Slot* slots, int64_t count, void* stream);
int step_cuda(int rule, const Hyper& hyper, const Slot* slots, int64_t count, void* stream);

}  // namespace gdbp::optim
