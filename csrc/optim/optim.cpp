#include "optim/optim.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/view_as_real.h>

#include "common/binding.h"
#include "optim/batch.h"

namespace gdbp::optim {

using at::Tensor;

int parse_rule(c10::string_view name) {
  const int rule = find_rule(std::string(name).c_str());
  TORCH_CHECK_VALUE(rule >= 0, "optim_step_: rule is '", name, "'; expected a name from GDBP_OPTIM_RULES");
  return rule;
}

Hyper parse_hyper(const double* values, size_t count) {
  constexpr size_t most = sizeof(Hyper) / sizeof(double);
  TORCH_CHECK_VALUE(count >= kSharedHyper && count <= most, "optim_step_: hyper has ", count,
                    " values; expected ", kSharedHyper, " to ", most, " in the order of struct Hyper");
  Hyper hyper{};
  std::copy(values, values + count, reinterpret_cast<double*>(&hyper));
  return hyper;
}

void Batch::clear() {
  for (Lane& lane : lanes_) lane.slots.clear();
  temporaries_.clear();
  copies_.clear();
  written_.clear();
}

void Batch::add(int rule, const Tensor& param, const Tensor& grad, const Tensor* states, double step) {
  const int count = rule_states(rule);
  TORCH_CHECK(grad.layout() == at::kStrided, "optimizer step: a gradient is sparse; expected a dense one; "
              "use torch.optim.SparseAdam or SGD, or set sparse=False in the embedding");
  TORCH_CHECK(grad.sizes() == param.sizes(), "optimizer step: a gradient has shape ", grad.sizes(),
              " and its parameter ", param.sizes(), "; expected the same");
  TORCH_CHECK(grad.device() == param.device(), "optimizer step: a gradient is on ", grad.device(),
              " and its parameter on ", param.device(), "; expected the same device");
  bool same_layout = grad.is_contiguous() && param.is_contiguous();
  for (int k = 0; k < count; ++k) {
    TORCH_CHECK(states[k].sizes() == param.sizes() && states[k].device() == param.device(),
                "optimizer step: a state tensor has shape ", states[k].sizes(), " on ", states[k].device(),
                " and its parameter ", param.sizes(), " on ", param.device(),
                "; expected the same; load a state_dict made for this model");
    TORCH_CHECK(states[k].scalar_type() == states[0].scalar_type(),
                "optimizer step: the states of one parameter have different dtypes; expected one");
    same_layout = same_layout && states[k].is_contiguous();
  }
  written_.push_back(param.unsafeGetTensorImpl());
  for (int k = 0; k < count; ++k) written_.push_back(states[k].unsafeGetTensorImpl());
  if (same_layout && !param.is_complex()) return add_dense(rule, param, grad, states, step);

  // Any order of elements will do as long as all arrays share it: the parameter's own, where it has no
  // gaps and no overlaps, else a dense copy that goes back after the launch.
  const Tensor p = param.is_complex() ? at::view_as_real(param) : param;
  const bool dense = p.is_non_overlapping_and_dense();
  const Tensor target = dense ? p : p.clone(at::MemoryFormat::Contiguous);
  const auto like_target = [&](const Tensor& t, bool written) {
    const Tensor x = t.is_complex() ? at::view_as_real(t) : t;
    if (x.strides() == target.strides()) return x;
    const Tensor copy = at::empty_strided(target.sizes(), target.strides(), x.options());
    copy.copy_(x);
    if (written) copies_.push_back({x, copy});
    return copy;
  };
  if (!dense) copies_.push_back({p, target});
  const Tensor g = like_target(grad, false);
  Tensor repaired[kMaxStates];
  for (int k = 0; k < count; ++k) repaired[k] = like_target(states[k], true);
  temporaries_.insert(temporaries_.end(), {target, g});
  add_dense(rule, target, g, repaired, step);
}

void Batch::add_dense(int rule, const Tensor& param, const Tensor& grad, const Tensor* states, double step) {
  Slot slot{};
  slot.param = param.mutable_data_ptr();
  slot.grad = grad.const_data_ptr();
  slot.numel = param.numel();
  slot.step = step;
  slot.param_dtype = dtype_of(param, "optimizer step", "a parameter");
  slot.grad_dtype = dtype_of(grad, "optimizer step", "a gradient");
  const int count = rule_states(rule);
  if (count > 0) slot.state_dtype = dtype_of(states[0], "optimizer step", "a state");
  for (int k = 0; k < count; ++k) slot.state[k] = states[k].mutable_data_ptr();
  const at::Device device = param.device();
  for (Lane& lane : lanes_) {
    if (lane.device == device) return lane.slots.push_back(slot);
  }
  lanes_.push_back({device, {slot}});
}

void Batch::run(int rule, const Hyper& hyper) {
  for (const Lane& lane : lanes_) {
    if (lane.slots.empty()) continue;
    run_on(lane.device, "optimizer step", step_cpu, GDBP_CUDA_LAUNCHER(step_cuda), rule, hyper, lane.slots.data(),
           int64_t(lane.slots.size()));
  }
  for (const Copy& copy : copies_) copy.to.copy_(copy.from);
  // A backward pass through the old values must fail, as it does after torch's own in-place updates.
  for (c10::TensorImpl* impl : written_)
    if (!impl->is_inference()) impl->bump_version();
}

namespace {

// One step over many tensors. states: rule_states(rule) lists of params' length, one after the other.
// counts: the number of this update for each parameter, 1 for the first.
void step(at::TensorList params, at::TensorList grads, at::TensorList states, c10::string_view rule_name,
          at::ArrayRef<double> hyper_values, at::IntArrayRef counts) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int rule = parse_rule(rule_name);
  const Hyper hyper = parse_hyper(hyper_values.data(), hyper_values.size());
  const size_t n = params.size(), kinds = rule_states(rule);
  TORCH_CHECK_VALUE(grads.size() == n && counts.size() == n && states.size() == n * kinds, "optim_step_: got ", n,
                    " params, ", grads.size(), " grads, ", counts.size(), " counts and ", states.size(),
                    " states; expected as many grads and counts as params, and ", kinds, " states for each");
  static thread_local Batch batch;
  batch.clear();
  for (size_t i = 0; i < n; ++i) {
    Tensor own[kMaxStates];
    for (size_t k = 0; k < kinds; ++k) own[k] = states[k * n + i];
    batch.add(rule, params[i], grads[i], own, double(counts[i]));
  }
  batch.run(rule, hyper);
  batch.clear();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdbp, m) {
  m.def(
      "optim_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, str rule, float[] hyper, int[] counts)"
      " -> ()",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(gdbp, CPU, m) { m.impl("optim_step_", &step); }
TORCH_LIBRARY_IMPL(gdbp, CUDA, m) { m.impl("optim_step_", &step); }

}  // namespace gdbp::optim
