#include "optim/plan.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

namespace gdbp::optim {

namespace py = pybind11;

namespace {

at::Tensor unwrap(const py::handle& object) {
  return THPVariable_Check(object.ptr()) ? THPVariable_Unpack(object.ptr()) : at::Tensor();
}

py::object item(const py::handle& dict, const py::handle& key) {
  return py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(dict.ptr(), key.ptr()));
}

double read_count(const at::Tensor& step) {
  return step.scalar_type() == at::kDouble ? *step.const_data_ptr<double>() : *step.const_data_ptr<float>();
}

void write_count(const at::Tensor& step, double count) {
  if (step.scalar_type() == at::kDouble) {
    *step.mutable_data_ptr<double>() = count;
  } else {
    *step.mutable_data_ptr<float>() = float(count);
  }
  step.unsafeGetTensorImpl()->bump_version();
}

bool is_count(const at::Tensor& step) {
  return step.defined() && step.device().is_cpu() && step.numel() == 1 &&
         (step.scalar_type() == at::kFloat || step.scalar_type() == at::kDouble);
}

}  // namespace

StepPlan::StepPlan(const std::string& rule, const py::list& params, const py::dict& state,
                   const std::vector<std::string>& keys, bool counts_steps, const std::vector<int64_t>& fresh)
    : rule_name_(rule), rule_(parse_rule(rule)), counts_steps_(counts_steps), state_object_(state) {
  for (const std::string& key : keys) keys_.emplace_back(key);
  if (counts_steps) keys_.emplace_back("step");
  for (const auto& [_, value] : state) state_dicts_.push_back(py::reinterpret_borrow<py::object>(value));
  entries_.resize(params.size());
  for (size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    entry.param_object = params[i];
    entry.param = unwrap(entry.param_object);
    entry.ready = true;
    if (keys_.empty()) continue;
    entry.state_dict = item(state, entry.param_object);
    for (size_t k = 0; k < keys_.size(); ++k) {
      if (entry.state_dict) entry.state_objects[k] = item(entry.state_dict, keys_[k]);
      const at::Tensor tensor = entry.state_objects[k] ? unwrap(entry.state_objects[k]) : at::Tensor();
      (k < keys.size() ? entry.states[k] : entry.step) = tensor;
      entry.ready = entry.ready && tensor.defined();
    }
    entry.ready = entry.ready && (!counts_steps || is_count(entry.step));
  }
  for (const int64_t i : fresh) entries_.at(i).fresh = true;
}

// Identity is enough: the plan holds references, so no address can have been used again; and a tensor whose
// data moved is read anew through its handle.
bool StepPlan::unchanged(const py::list& params, const py::dict& state) const {
  if (!state.is(state_object_) || params.size() != entries_.size() || state.size() != state_dicts_.size())
    return false;
  for (size_t i = 0; i < entries_.size(); ++i)
    if (PyList_GET_ITEM(params.ptr(), Py_ssize_t(i)) != entries_[i].param_object.ptr()) return false;
  Py_ssize_t position = 0;
  PyObject* value = nullptr;
  for (const py::object& known : state_dicts_)
    if (!PyDict_Next(state.ptr(), &position, nullptr, &value) || value != known.ptr()) return false;
  return true;
}

bool StepPlan::unchanged(const Entry& entry) const {
  for (size_t k = 0; k < keys_.size(); ++k)
    if (PyDict_GetItemWithError(entry.state_dict.ptr(), keys_[k].ptr()) != entry.state_objects[k].ptr()) return false;
  return !counts_steps_ || is_count(entry.step);
}

bool StepPlan::step(const py::list& params, const py::dict& state, const std::string& rule,
                    const std::vector<double>& hyper_values) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (rule != rule_name_ || !unchanged(params, state)) return false;
  const Hyper hyper = parse_hyper(hyper_values.data(), hyper_values.size());
  batch_.clear();
  stepped_.clear();
  for (Entry& entry : entries_) {
    const at::Tensor& grad = entry.param.grad();
    if (!grad.defined()) continue;
    if (!entry.ready || !unchanged(entry)) return false;
    const double count = counts_steps_ ? read_count(entry.step) + 1 : entry.fresh ? 1 : 2;
    batch_.add(rule_, entry.param, grad, entry.states, count);
    stepped_.push_back(&entry);
  }
  batch_.run(rule_, hyper);
  for (Entry* entry : stepped_) {
    if (counts_steps_) write_count(entry->step, read_count(entry->step) + 1);
    entry->fresh = false;
  }
  batch_.clear();
  return true;
}

void bind_step_plan(py::module_& module) {
  py::class_<StepPlan>(module, "StepPlan", "The tensors of one parameter group, ready for a step.")
      .def(py::init<const std::string&, const py::list&, const py::dict&, const std::vector<std::string>&, bool,
                    const std::vector<int64_t>&>(),
           py::arg("rule"), py::arg("params"), py::arg("state"), py::arg("keys"), py::arg("counts_steps"),
           py::arg("fresh"))
      .def("step", &StepPlan::step, py::arg("params"), py::arg("state"), py::arg("rule"), py::arg("hyper"));
}

}  // namespace gdbp::optim
