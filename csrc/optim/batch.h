// The tensors of one optimizer step, on their way to the launchers: one dense line of elements each.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "optim/optim.h"

namespace gdbp::optim {

// One parameter and what goes with it.
struct Member {
  // grad: undefined where it has no tensor; its address is then set in the slot, and it is laid out as the parameter.
  at::Tensor param, grad;
  at::Tensor states[kMaxStates];
  at::Tensor scales[kMaxStates];  // for states of 8 bits: float32, one for each kQuantBlock elements
  at::Tensor master;              // float32 or float64 original, of which param is the rounded copy; or undefined
  at::Tensor average;             // moving average of the parameter; or undefined
  at::Tensor copy;                // the parameter in another dtype, where it is no master's copy itself; or undefined
  double average_weight = 0;
  uint64_t seed = 0;  // for stochastic rounding; 0 for none
  Clock clock{};
};

// Checks and collects; nothing is changed before run(). Kept between steps for its memory alone.
class Batch {
 public:
  // Tensors that are stepped together: one device, one rule.
  struct Lane {
    at::Device device;
    int rule;
    std::vector<Slot> slots;
  };

  // Where a member's slot is.
  struct Place {
    size_t lane, slot;
  };

  // hyper must live until run().
  Place add(int rule, const Hyper* hyper, const Member& member);
  Slot& at(const Place& place) { return lanes_[place.lane].slots[place.slot]; }
  const Lane& lane_of(const Place& place) const { return lanes_[place.lane]; }
  // One launch a lane; then repaired layouts are copied back and version counters bumped.
  // control: for each device the address of its Control, or null for none.
  template <class ControlOf>
  void run(const ControlOf& control_of) {
    for (const Lane& lane : lanes_)
      if (!lane.slots.empty()) launch(lane, control_of(lane.device));
    finish();
  }
  // What run() does after the launches.
  void finish();
  void clear();
  const std::vector<Lane>& lanes() const { return lanes_; }

 private:
  struct Copy {
    at::Tensor to, from;
  };
  size_t lane(const at::Device& device, int rule);
  Place add_dense(int rule, const Hyper* hyper, const Member& member);
  void launch(const Lane& lane, const Control* control);

  std::vector<Lane> lanes_;
  std::vector<at::Tensor> temporaries_;
  std::vector<Copy> copies_;
  std::vector<c10::TensorImpl*> written_;
};

int parse_rule(c10::string_view name);
// From the flat list in the order of Hyper's fields.
Hyper parse_hyper(const double* values, size_t count);

// What a parameter counts: its step and, for NAdam, a product, as 0-dim CPU tensors of float or double;
// undefined for rules that count nothing and ask only whether this update is the first.
struct Counts {
  at::Tensor step, product;
  bool fresh = false;

  // Whether a tensor can be a count here.
  static bool fits(const at::Tensor& count);
  // The clock of the next update, without moving the counts.
  Clock tick(int rule, const Hyper& hyper) const;
  void set(const Clock& clock);
};

// The step's view of grad::Norm (total, coefficient, skip), a tensor of three doubles.
const Control* control_of(const at::Tensor& norm);

}  // namespace gdbp::optim
