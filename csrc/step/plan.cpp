#include "step/plan.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/record_function.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstddef>

#include "common/binding.h"
#include "common/python.h"
#include "common/random.h"
#include "grad/grad.h"

namespace gdbp::step {

namespace py = pybind11;

namespace {

py::object item(const py::handle& dict, const py::handle& key) {
  return py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(dict.ptr(), key.ptr()));
}

void prefetch(const void* p) {
  for (int line = 0; line < 3; ++line) __builtin_prefetch(static_cast<const char*>(p) + 64 * line);
}

}  // namespace

// Small tensors are a chain of small objects each, all of them out of the cache by the next step: most of the time
// goes into waiting for them, and less where they are asked for ahead.
void StepPlan::prefetch_tensors(const Entry& entry) {
  prefetch(entry.member.param.unsafeGetTensorImpl());
  prefetch(entry.last_grad);
  for (const at::Tensor& state : entry.member.states)
    if (state.defined()) prefetch(state.unsafeGetTensorImpl());
  if (entry.counts.step.defined()) prefetch(entry.counts.step.unsafeGetTensorImpl());
  if (entry.state_dict) __builtin_prefetch(entry.state_dict.ptr());
}
void StepPlan::prefetch_storages(const Entry& entry) {
  const auto of = [](const at::Tensor& t) {
    if (t.defined() && t.has_storage())
      __builtin_prefetch(t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
  };
  of(entry.member.param);
  for (const at::Tensor& state : entry.member.states) of(state);
  of(entry.counts.step);
}

StepPlan::StepPlan(const std::vector<Group>& groups, const py::dict& state,
                   const std::vector<std::vector<std::pair<std::string, std::string>>>& roles,
                   const std::vector<std::vector<int64_t>>& fresh, const std::vector<std::vector<int64_t>>& waiting)
    : state_object_(state) {
  static std::atomic<uint64_t> made{0};
  id_ = ++made;
  for (const auto& [_, value] : state) state_dicts_.push_back(py::reinterpret_borrow<py::object>(value));
  for (size_t g = 0; g < groups.size(); ++g) {
    const auto& [params, name, hyper] = groups[g];
    Rule rule{name, optim::parse_rule(name), {}, params.size(), false, {}};
    for (const auto& [role, key] : roles[g]) {
      rule.keys.emplace_back(key);
      rule.has_masters = rule.has_masters || role == "master";
    }
    if (rule.has_masters) plain_.give_up();
    const size_t first = entries_.size();
    for (const py::handle& param : params) {
      Entry entry;
      param_objects_.push_back(py::reinterpret_borrow<py::object>(param));
      entry.member.param = unwrap(param);
      entry.group = int(g);
      entry.ready = true;
      if (!rule.keys.empty()) entry.state_dict = item(state, param);
      size_t states = 0, scales = 0;
      for (size_t k = 0; k < rule.keys.size(); ++k) {
        const std::string& role = roles[g][k].first;
        entry.state_objects.push_back(entry.state_dict ? item(entry.state_dict, rule.keys[k]) : py::object());
        const at::Tensor tensor = unwrap(entry.state_objects.back());
        // Not every parameter has them: float32 is its own master, small states are not worth 8 bits.
        const bool optional = role == "master" || role == "scale";
        entry.ready = entry.ready && (optional || tensor.defined());
        if (role == "state") entry.member.states[states++] = tensor;
        if (role == "scale") entry.member.scales[scales++] = tensor;
        if (role == "master") entry.member.master = tensor;
        if (role == "average") entry.member.average = tensor;
        if (role == "copy") entry.member.copy = tensor;
        if (role != "count") continue;
        entry.ready = entry.ready && optim::Counts::fits(tensor);
        (entry.counts.step.defined() ? entry.counts.product : entry.counts.step) = tensor;
      }
      entries_.push_back(std::move(entry));
    }
    for (const int64_t i : fresh[g]) entries_.at(first + i).counts.fresh = true;
    for (const int64_t i : waiting[g]) entries_.at(first + i).ready = false;
    rules_.push_back(std::move(rule));
  }
  for (Entry& entry : entries_) {
    plain_.add(entry.group, rules_[entry.group].index, entry.member, entry.counts, entry.ready);
    if (entry.state_dict) plain_.watch(entry.state_dict, entry.state_objects);
  }
}

void StepPlan::configure(double average_weight, uint64_t seed) {
  average_weight_ = average_weight;
  seed_ = seed;
  if (seed != 0) plain_.give_up();
}

// Identity is enough: the plan holds references, so no address can have been used again; and a tensor whose
// data moved is read anew through its handle.
bool StepPlan::unchanged(const std::vector<Group>& groups, const py::dict& state) const {
  if (!state.is(state_object_) || groups.size() != rules_.size() || state.size() != state_dicts_.size()) return false;
  size_t at = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    const auto& [params, name, hyper] = groups[g];
    if (name != rules_[g].name || params.size() != rules_[g].params) return false;
    for (size_t i = 0; i < rules_[g].params; ++i)
      if (PyList_GET_ITEM(params.ptr(), Py_ssize_t(i)) != param_objects_[at++].ptr()) return false;
  }
  Py_ssize_t position = 0;
  PyObject* value = nullptr;
  for (const py::object& known : state_dicts_)
    if (!PyDict_Next(state.ptr(), &position, nullptr, &value) || value != known.ptr()) return false;
  return true;
}

bool StepPlan::unchanged(const Entry& entry) const {
  // Of a parameter without a state nothing is kept, and state.size() has been looked at.
  if (!entry.state_dict) return true;
  const Rule& rule = rules_[entry.group];
  for (size_t k = 0; k < rule.keys.size(); ++k)
    if (PyDict_GetItemWithError(entry.state_dict.ptr(), rule.keys[k].ptr()) != entry.state_objects[k].ptr())
      return false;
  return true;
}

bool StepPlan::collect(const std::vector<Group>& groups, const py::dict& state) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (!begin(groups, state)) return false;
  if (!collect_plain()) return collect_any(nullptr);
  plain_.hold();
  return true;
}
bool StepPlan::collect(const std::vector<Group>& groups, const py::dict& state, const std::vector<char>& takes_part) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return begin(groups, state) && collect_any(&takes_part);
}
bool StepPlan::step(const std::vector<Group>& groups, const py::dict& state) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (!begin(groups, state) || !(collect_plain() || collect_any(nullptr))) return false;
  run(std::nullopt, false);
  return true;
}

// Another stream for every parameter and step; never 0, which would mean none.
void StepPlan::tick(size_t i) {
  Entry& entry = entries_[i];
  const Rule& rule = rules_[entry.group];
  entry.member.clock = entry.counts.tick(rule.index, rule.hyper);
  if (seed_ != 0) entry.member.seed = combine_seed(combine_seed(seed_, i), uint64_t(entry.member.clock.step)) | 1;
}

bool StepPlan::begin(const std::vector<Group>& groups, const py::dict& state) {
  if (!unchanged(groups, state)) return false;
  for (size_t g = 0; g < groups.size(); ++g) {
    const std::vector<double>& hyper = std::get<2>(groups[g]);
    rules_[g].hyper = optim::parse_hyper(hyper.data(), hyper.size());
  }
  batch_.clear();
  collected_.clear();
  plain_.forget();
  is_plain_ = false;
  return true;
}

bool StepPlan::collect_plain() {
  hypers_.clear();
  for (const Rule& rule : rules_) hypers_.push_back(&rule.hyper);
  return is_plain_ = plain_.collect(hypers_);
}

bool StepPlan::collect_any(const std::vector<char>* takes_part) {
  for (size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    optim::Member& member = entry.member;
    if (i + 6 < entries_.size()) prefetch_tensors(entries_[i + 6]);
    if (i + 3 < entries_.size()) prefetch_storages(entries_[i + 3]);
    if (takes_part && !(*takes_part)[i]) continue;
    if (!takes_part) member.grad = member.param.grad();
    if (!takes_part && !member.grad.defined()) continue;
    if (!takes_part) entry.last_grad = member.grad.unsafeGetTensorImpl();
    if (!entry.ready || !unchanged(entry)) return false;
    const Rule& rule = rules_[entry.group];
    // Somebody made it a half type since the plan was made.
    if (rule.has_masters && !member.master.defined() && member.param.element_size() == 2) return false;
    if (member.master.defined() && member.param._version() != entry.version) follow(entry);
    tick(i);
    member.average_weight = average_weight_;
    entry.place = batch_.add(rule.index, &rule.hyper, member);
    collected_.push_back(i);
  }
  return true;
}

// Somebody wrote new weights into the parameter since our last step, or may have before our first: where it is not the
// rounded master, the master becomes what it is.
void StepPlan::follow(Entry& entry) {
  const at::Tensor &master = entry.member.master, &param = entry.member.param;
  if (master.sizes() != param.sizes() || master.device() != param.device()) return;  // an error later
  const at::Tensor own = param.detach(), kept = own.eq(master.to(own.scalar_type()));
  master.copy_(at::where(kept, master, own.to(master.scalar_type())));
}

at::Tensor StepPlan::norm(double max_norm, double scale, bool skip_nonfinite) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const grad::Limit limit{max_norm, scale, double(skip_nonfinite)};
  std::vector<grad::Source> sources;
  at::Device device = at::kCPU;
  if (is_plain_) plain_.sources(sources);
  for (const optim::Batch::Lane& lane : batch_.lanes()) {
    if (lane.slots.empty()) continue;
    TORCH_CHECK(sources.empty() || lane.device == device, "max_grad_norm: the gradients are on ", device, " and ",
                lane.device, "; expected one device; clip with torch.nn.utils.clip_grad_norm_ instead");
    device = lane.device;
    for (const optim::Slot& slot : lane.slots) sources.push_back({slot.grad, slot.numel, slot.grad_dtype});
  }
  // The step reads the last two numbers as its Control.
  static_assert(sizeof(grad::Norm) == sizeof(double) + sizeof(optim::Control));
  static_assert(offsetof(grad::Norm, coefficient) == sizeof(double) + offsetof(optim::Control, coefficient));
  static_assert(offsetof(grad::Norm, skip) == sizeof(double) + offsetof(optim::Control, skip));
  const at::Tensor norm = at::empty({3}, at::TensorOptions(at::kDouble).device(device));
  auto* const out = static_cast<grad::Norm*>(norm.mutable_data_ptr());
  const auto on_cpu = [](const grad::Source* s, int64_t n, const grad::Limit& l, grad::Norm* to, void*, void* stream) {
    return grad::norm_cpu(s, n, l, to, stream);
  };
  at::Tensor workspace;
  if (!device.is_cpu())
    workspace = at::empty({grad::norm_workspace_bytes(sources.data(), int64_t(sources.size()))},
                          at::TensorOptions(at::kByte).device(device));
  run_on(device, "max_grad_norm", +on_cpu, GDBP_CUDA_LAUNCHER(grad::norm_cuda), sources.data(), int64_t(sources.size()),
         limit, out, workspace.defined() ? workspace.mutable_data_ptr() : nullptr);
  return norm;
}

bool StepPlan::run(const std::optional<at::Tensor>& norm, bool may_skip) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  // The counts are on the host, so whether the step counts must be known there: on CUDA the one
  // synchronisation, and only where a step may be skipped.
  const bool skip = norm && may_skip && norm->to(at::kCPU).const_data_ptr<double>()[2] != 0;
  if (!skip) {
    std::vector<at::Tensor> copies;  // for other devices than the norm's own
    const auto control_of = [&](const at::Device& device) -> const optim::Control* {
      if (!norm) return nullptr;
      if (norm->device() == device) return optim::control_of(*norm);
      return optim::control_of(copies.emplace_back(norm->to(device)));
    };
    if (is_plain_) {
      plain_.run(control_of(at::kCPU));
      plain_.finish();
    } else {
      batch_.run(control_of);
      count();
    }
  }
  forget();
  return !skip;
}

void StepPlan::count() {
  for (const size_t i : collected_) entries_[i].counts.set(entries_[i].member.clock);
}

// Nothing of the backward pass is kept alive until the next one.
void StepPlan::forget() {
  batch_.clear();
  plain_.forget();
  for (const size_t i : collected_) {
    Entry& entry = entries_[i];
    entry.member.grad.reset();
    if (entry.member.master.defined()) entry.version = entry.member.param._version();
  }
}

void StepPlan::settle(bool counts) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (counts) batch_.finish();
  if (counts) count();
  forget();
}

void StepPlan::advance(bool counts) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (counts) batch_.finish();
  if (counts) count();
  for (const size_t i : collected_) {
    tick(i);
    slot(i).clock = entries_[i].member.clock;
    slot(i).seed = entries_[i].member.seed;
  }
}

void bind(py::module_& module) {
  module.def("is_observed", &at::hasCallbacks, "Whether a profiler or another observer of this thread is on.");
  py::class_<StepPlan>(module, "StepPlan", "The tensors of an optimizer, ready for a step.")
      .def(py::init<const std::vector<Group>&, const py::dict&,
                    const std::vector<std::vector<std::pair<std::string, std::string>>>&,
                    const std::vector<std::vector<int64_t>>&, const std::vector<std::vector<int64_t>>&>(),
           py::arg("groups"), py::arg("state"), py::arg("roles"), py::arg("fresh"), py::arg("waiting"))
      .def("configure", &StepPlan::configure, py::arg("average_weight"), py::arg("seed"))
      .def(
          "collect",
          [](StepPlan& plan, const std::vector<Group>& groups, const py::dict& state) {
            return plan.collect(groups, state);
          },
          py::arg("groups"), py::arg("state"))
      .def("step", &StepPlan::step, py::arg("groups"), py::arg("state"))
      .def(
          "norm",
          [](StepPlan& plan, double max_norm, double scale, bool skip) {
            return wrap(plan.norm(max_norm, scale, skip));
          },
          py::arg("max_norm"), py::arg("scale"), py::arg("skip_nonfinite"))
      .def(
          "run",
          [](StepPlan& plan, const py::object& norm, bool may_skip) {
            return plan.run(norm.is_none() ? std::nullopt : std::optional(unwrap(norm)), may_skip);
          },
          py::arg("norm"), py::arg("may_skip"));
}

}  // namespace gdbp::step
