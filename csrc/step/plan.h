// An optimizer's step as C++ sees it, so that it costs nanoseconds a tensor and not microseconds.
#pragma once
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "optim/batch.h"
#include "step/plain.h"

namespace gdbp::step {

// What Python says of one parameter group at every step: its parameters, its rule, its hyper-parameters.
using Group = std::tuple<pybind11::list, std::string, std::vector<double>>;

// Remembers which tensors make up an optimizer's groups and states; believes nothing it has not looked at
// again in this step. Python owns everything: the plan only holds on to it.
class StepPlan {
 public:
  // state: optimizer.state. roles: for each group what its parameters keep in their state, as pairs of role and
  // key: "state" (in the rule's order), "scale" (of 8-bit states, likewise), "count" (0-dim CPU tensors: step,
  // product), "master", "average", "copy". fresh: for each group the positions of parameters whose first update this
  // will be, for rules that keep no count. waiting: the positions of those whose state is still to be made.
  StepPlan(const std::vector<Group>& groups, const pybind11::dict& state,
           const std::vector<std::vector<std::pair<std::string, std::string>>>& roles,
           const std::vector<std::vector<int64_t>>& fresh, const std::vector<std::vector<int64_t>>& waiting);

  // How the parameters are written. average_weight: what each step adds to the moving averages. seed: of
  // stochastic rounding, 0 for rounding to nearest.
  void configure(double average_weight, uint64_t seed);

  // Takes in every parameter that has a gradient. False where the groups or the state are not what they were
  // when the plan was made, or a gradient has come to a parameter without state: make another plan.
  bool collect(const std::vector<Group>& groups, const pybind11::dict& state);
  // The same and run(), where nothing is asked of the gradients first.
  bool step(const std::vector<Group>& groups, const pybind11::dict& state);

  // ---- for a caller that has gradients of its own, of the parameters that `takes_part` says, by position ----
  bool collect(const std::vector<Group>& groups, const pybind11::dict& state, const std::vector<char>& takes_part);
  size_t size() const { return entries_.size(); }
  const at::Tensor& param(size_t i) const { return entries_[i].member.param; }
  // Of a parameter that was collected, until settle(): the caller sets its gradient's address, and launches it.
  optim::Slot& slot(size_t i) { return batch_.at(entries_[i].place); }
  int rule(size_t i) const { return batch_.lane_of(entries_[i].place).rule; }
  // After the launches. counts: whether the step took place.
  void settle(bool counts);
  // Instead of settle(), where one more step over the same parameters follows with nothing in between.
  void advance(bool counts);
  // Tells this plan from any other, also from one that had its address.
  uint64_t id() const { return id_; }

  // Of the gradients just collected: a tensor of grad::Norm's three numbers, on their device.
  at::Tensor norm(double max_norm, double scale, bool skip_nonfinite);
  // Updates what was collected, as `norm` decides, if there is one. may_skip: whether it may decide to skip the
  // step; false is returned where it did.
  bool run(const std::optional<at::Tensor>& norm, bool may_skip);

 private:
  struct Entry {
    optim::Member member;
    optim::Counts counts;
    optim::Batch::Place place{};
    pybind11::object state_dict;
    std::vector<pybind11::object> state_objects;
    const void* last_grad = nullptr;  // where the next gradient may be, too; never followed
    int group = 0;
    int64_t version = -1;  // the parameter's after our last step, where it has a master
    bool ready = false;
  };
  bool begin(const std::vector<Group>& groups, const pybind11::dict& state);
  bool collect_any(const std::vector<char>* takes_part);
  bool collect_plain();
  void tick(size_t i);
  void count();
  void forget();
  static void follow(Entry& entry);
  bool unchanged(const std::vector<Group>& groups, const pybind11::dict& state) const;
  bool unchanged(const Entry& entry) const;
  static void prefetch_tensors(const Entry& entry);
  static void prefetch_storages(const Entry& entry);

  struct Rule {
    std::string name;
    int index;
    std::vector<pybind11::str> keys;
    size_t params;
    bool has_masters;
    optim::Hyper hyper;
  };
  std::vector<Rule> rules_;
  std::vector<Entry> entries_;
  PlainStep plain_;
  bool is_plain_ = false;  // whether plain_ has taken this step in, and batch_ nothing
  pybind11::object state_object_;
  std::vector<pybind11::object> param_objects_;
  std::vector<const optim::Hyper*> hypers_;
  std::vector<pybind11::object> state_dicts_;
  optim::Batch batch_;
  std::vector<size_t> collected_;
  uint64_t id_;
  double average_weight_ = 0;
  uint64_t seed_ = 0;
};

void bind(pybind11::module_& module);

}  // namespace gdbp::step
