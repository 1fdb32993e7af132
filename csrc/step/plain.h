// The optimizer's step of plain tensors: dense, contiguous, of floats, on the CPU, and no more than a parameter, its
// gradient, its states and its step count. A small tensor's step is waiting for memory: some 40 cache lines that
// describe it, beside a few of numbers. So here each is looked at once, asked for ahead, and by all threads.
#pragma once
#include <pybind11/pybind11.h>

#include <atomic>
#include <vector>

#include "grad/grad.h"
#include "optim/batch.h"

namespace gdbp::step {

// Whatever is not as expected is no error here: collect() says false, and the long way (optim::Batch) decides.
// Everything pointed to is kept alive by the StepPlan.
class PlainStep {
 public:
  // One parameter. counts.step may be undefined, and counts must stay where it is.
  void add(int group, int rule, const optim::Member& member, optim::Counts& counts, bool ready);
  // Its state as Python has it, and the states and counts among the values of that.
  void watch(const pybind11::dict& state, const std::vector<pybind11::object>& used);
  // A parameter that is not plain by what it keeps: there is no short way.
  void give_up() { possible_ = false; }

  // Takes in every parameter that has a gradient. hyper: by group; must live until run().
  bool collect(const std::vector<const optim::Hyper*>& hyper);
  // Keeps the gradients alive until forget(), where Python may run in between.
  void hold();
  void sources(std::vector<grad::Source>& to) const;
  void run(const optim::Control* control) const;
  // After a step that took place: the version counters and step counts move.
  void finish();
  void forget() { held_.clear(); }

 private:
  struct Row {
    c10::TensorImpl* param;
    c10::TensorImpl* states[optim::kMaxStates];
    c10::TensorImpl* count;  // or null
    optim::Counts* counts;
    double step;
    uint32_t lane, slot;  // where it goes if all have gradients
    int group;
    bool ready, taken;
  };
  // All of one rule. Only its first `taken` slots are of this step.
  struct Lane {
    int rule;
    std::vector<optim::Slot> slots;
    size_t taken;
  };
  // A parameter's state as a dict: `size` entries from `first` on of seen_.
  struct Dict {
    PyObject* dict;
    uint32_t first, size;
  };
  // An item of it; value: null where it does not matter.
  struct Seen {
    PyObject *key, *value;
  };
  bool unchanged(const Dict& dict) const;
  bool fill(Row& row, const optim::Hyper* hyper);
  void close_gaps();
  void prefetch_ahead(int64_t i, int64_t end) const;

  bool possible_ = true;
  std::vector<Row> rows_;
  std::vector<Lane> lanes_;
  std::vector<Dict> dicts_;
  std::vector<Seen> seen_;
  std::vector<pybind11::object> keys_;  // keeps the keys of seen_ alive, once each
  std::vector<at::Tensor> held_;
};

}  // namespace gdbp::step
