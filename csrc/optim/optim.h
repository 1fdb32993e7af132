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
  Clock clock;
  const Hyper* hyper;
  Dtype param_dtype, grad_dtype, state_dtype;

  // What is written besides, each null or 0 for none.
  float* scale[kMaxStates] = {};  // for state_dtype blockwise8: one for each kQuantBlock elements
  void* copy = nullptr;           // the new parameter in copy_dtype: the model's own, where `param` is its master
  void* average = nullptr;        // its moving average in average_dtype, moved by average_weight
  double average_weight = 0;
  uint64_t seed = 0;  // bfloat16 parameters and states of 8 bits are rounded stochastically, with this seed
  Dtype copy_dtype = {}, average_dtype = {};
  // Whether there is anything of that: then elements share a scale, or have random numbers by their position.
  bool has_extra() const { return copy || average || seed != 0 || state_dtype == Dtype::blockwise8; }

  // CUDA alone: the gradient is the sum of so many arrays of float32, `part_stride` elements from one to the next, all
  // slots of a call alike; 0 where it is one array.
  int parts = 0;
  int64_t part_stride = 0;
};

// Decided on the device by the gradients themselves, see grad::Norm; read by the step, never by the host.
struct Control {
  double coefficient;  // multiplies every gradient
  double skip;         // not 0: nothing is changed
};

// The row of `name` in GDBP_OPTIM_RULES, or -1.
int find_rule(const char* name);
int rule_states(int rule);
// The momentum of one step, where the rule has a schedule of it (NAdam); 1 for every other.
double scheduled_momentum(int rule, const Hyper& hyper, double step);

// control: null for none.
int step_cpu(int rule, const Slot* slots, int64_t count, const Control* control, void* stream);
int step_cuda(int rule, const Slot* slots, int64_t count, const Control* control, void* stream);

}  // namespace gdbp::optim
