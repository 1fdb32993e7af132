#include "optim/optim.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/view_as_real.h>

#include <algorithm>

#include "common/binding.h"
#include "optim/batch.h"
#include "optim/blockwise8.h"

namespace gdbp::optim {

using at::Tensor;

int parse_rule(c10::string_view name) {
  const int rule = find_rule(std::string(name).c_str());
  TORCH_CHECK_VALUE(rule >= 0, "optim_step_: rule is '", name, "'; expected a name from GDBP_OPTIM_RULES");
  return rule;
}

Hyper parse_hyper(const double* values, size_t count) {
  constexpr size_t most = sizeof(Hyper) / sizeof(double);
  TORCH_CHECK_VALUE(count >= kSharedHyper && count <= most, "optim_step_: hyper has ", count, " values; expected ",
                    kSharedHyper, " to ", most, " in the order of struct Hyper");
  Hyper hyper{};
  std::copy(values, values + count, reinterpret_cast<double*>(&hyper));
  return hyper;
}

bool Counts::fits(const Tensor& count) {
  return count.defined() && count.device().is_cpu() && count.numel() == 1 &&
         (count.scalar_type() == at::kFloat || count.scalar_type() == at::kDouble);
}

namespace {

double read(const Tensor& count) {
  return count.scalar_type() == at::kDouble ? *count.const_data_ptr<double>() : *count.const_data_ptr<float>();
}

void write(const Tensor& count, double value) {
  if (count.scalar_type() == at::kDouble) {
    *count.mutable_data_ptr<double>() = value;
  } else {
    *count.mutable_data_ptr<float>() = float(value);
  }
  mark_changed(count);
}

}  // namespace

Clock Counts::tick(int rule, const Hyper& hyper) const {
  if (!step.defined()) return {fresh ? 1.0 : 2.0, 1};
  const double next = read(step) + 1;
  if (!product.defined()) return {next, 1};
  // As torch multiplies it, in the count's own type.
  const double momentum = scheduled_momentum(rule, hyper, next);
  const double in_double = read(product) * momentum;
  return {next, product.scalar_type() == at::kDouble ? in_double : double(float(read(product)) * float(momentum))};
}

void Counts::set(const Clock& clock) {
  if (step.defined()) write(step, clock.step);
  if (product.defined()) write(product, clock.product);
  fresh = false;
}

const Control* control_of(const Tensor& norm) {
  TORCH_CHECK(norm.scalar_type() == at::kDouble && norm.numel() == 3 && norm.is_contiguous(),
              "optim_step_: norm has shape ", norm.sizes(), " and dtype ", norm.scalar_type(),
              "; expected the three float64 numbers that grad_norm returns");
  static_assert(sizeof(Control) == 2 * sizeof(double));
  return reinterpret_cast<const Control*>(norm.const_data_ptr<double>() + 1);
}

void Batch::clear() {
  for (Lane& lane : lanes_) lane.slots.clear();
  temporaries_.clear();
  copies_.clear();
  written_.clear();
}

namespace {

void check_grad(const Member& m) {
  if (!m.grad.defined()) return;
  TORCH_CHECK(m.grad.layout() == at::kStrided,
              "optimizer step: a gradient is sparse; expected a dense one; "
              "use torch.optim.SparseAdam or SGD, or set sparse=False in the embedding");
  TORCH_CHECK(!m.grad.key_set().has(c10::DispatchKey::Python),
              "optimizer step: a gradient is of a class of its own, such as DTensor, and its parameter a plain tensor; "
              "expected both to be of one kind; convert one of them");
  TORCH_CHECK(m.grad.sizes() == m.param.sizes(), "optimizer step: a gradient has shape ", m.grad.sizes(),
              " and its parameter ", m.param.sizes(), "; expected the same");
  TORCH_CHECK(m.grad.device() == m.param.device(), "optimizer step: a gradient is on ", m.grad.device(),
              " and its parameter on ", m.param.device(), "; expected the same device");
}

void check_state(const Member& m, const Tensor& state) {
  TORCH_CHECK(state.sizes() == m.param.sizes() && state.device() == m.param.device(),
              "optimizer step: a state tensor has shape ", state.sizes(), " on ", state.device(), " and its parameter ",
              m.param.sizes(), " on ", m.param.device(), "; expected the same; load a state_dict made for this model");
}

}  // namespace

namespace {

// Whether the numbers in memory are yet to be negated or conjugated.
bool is_lazy(const Tensor& t) { return t.is_neg() || t.is_conj(); }

}  // namespace

Batch::Place Batch::add(int rule, const Hyper* hyper, const Member& m) {
  const int count = rule_states(rule);
  check_grad(m);
  TORCH_CHECK(!is_lazy(m.param),
              "optimizer step: a parameter is a lazily negated or conjugated view; expected memory of its own; "
              "make it with .resolve_neg().resolve_conj()");
  if (m.grad.defined() && is_lazy(m.grad)) {
    Member with_own = m;
    with_own.grad = m.grad.resolve_neg().resolve_conj();
    temporaries_.push_back(with_own.grad);
    return add(rule, hyper, with_own);
  }
  bool same_layout = (!m.grad.defined() || m.grad.is_contiguous()) && m.param.is_contiguous();
  written_.push_back(m.param.unsafeGetTensorImpl());
  const auto see = [&](const Tensor& state) {
    check_state(m, state);
    same_layout = same_layout && state.is_contiguous();
    written_.push_back(state.unsafeGetTensorImpl());
  };
  for (int k = 0; k < count; ++k) {
    see(m.states[k]);
    TORCH_CHECK(m.states[k].scalar_type() == m.states[0].scalar_type(),
                "optimizer step: the states of one parameter have different dtypes; expected one");
  }
  if (m.master.defined()) see(m.master);
  if (m.average.defined()) see(m.average);
  if (m.copy.defined()) see(m.copy);
  if (same_layout && !m.param.is_complex()) return add_dense(rule, hyper, m);

  // Any order of elements will do as long as all arrays share it: the parameter's own, where it has no
  // gaps and no overlaps, else a dense copy that goes back after the launch.
  const Tensor p = m.param.is_complex() ? at::view_as_real(m.param) : m.param;
  const bool dense = p.is_non_overlapping_and_dense();
  Member like = m;
  like.param = dense ? p : p.clone(at::MemoryFormat::Contiguous);
  if (!dense) copies_.push_back({p, like.param});
  const auto lay_out = [&](Tensor& t, bool written) {
    if (!t.defined()) return;
    const Tensor x = t.is_complex() ? at::view_as_real(t) : t;
    t = x;
    if (x.strides() == like.param.strides()) return;
    t = at::empty_strided(like.param.sizes(), like.param.strides(), x.options());
    t.copy_(x);
    if (written) copies_.push_back({x, t});
  };
  lay_out(like.grad, false);
  for (int k = 0; k < count; ++k) lay_out(like.states[k], true);
  lay_out(like.master, true);
  lay_out(like.average, true);
  lay_out(like.copy, true);
  temporaries_.insert(temporaries_.end(), {like.param, like.grad});
  return add_dense(rule, hyper, like);
}

Batch::Place Batch::add_dense(int rule, const Hyper* hyper, const Member& m) {
  const size_t index = lane(m.param.device(), rule);
  const Place place{index, lanes_[index].slots.size()};
  // In its place at once: a slot is 180 bytes.
  Slot& slot = lanes_[index].slots.emplace_back();
  const char* const op = "optimizer step";
  const Tensor& original = m.master.defined() ? m.master : m.param;
  slot.param = original.mutable_data_ptr();
  slot.param_dtype = dtype_of(original, op, "a parameter");
  slot.grad = m.grad.defined() ? m.grad.const_data_ptr() : nullptr;
  slot.grad_dtype = dtype_of(m.grad.defined() ? m.grad : m.param, op, "a gradient");
  slot.numel = m.param.numel();
  slot.clock = m.clock;
  slot.hyper = hyper;
  slot.seed = m.seed;
  const int count = rule_states(rule);
  const bool blockwise = count > 0 && m.states[0].scalar_type() == at::kChar;
  if (count > 0) slot.state_dtype = blockwise ? Dtype::blockwise8 : dtype_of(m.states[0], op, "a state");
  for (int k = 0; k < count; ++k) {
    slot.state[k] = m.states[k].mutable_data_ptr();
    if (!blockwise) continue;
    const int64_t blocks = (slot.numel + kQuantBlock - 1) / kQuantBlock;
    TORCH_CHECK(m.scales[k].defined() && m.scales[k].scalar_type() == at::kFloat && m.scales[k].is_contiguous() &&
                    m.scales[k].numel() == blocks,
                "optimizer step: a state of 8 bits has no fitting scales; expected ", blocks,
                " float32 numbers; load a state_dict made for this model");
    slot.scale[k] = m.scales[k].mutable_data_ptr<float>();
  }
  if (const Tensor& copy = m.master.defined() ? m.param : m.copy; copy.defined()) {
    slot.copy = copy.mutable_data_ptr();
    slot.copy_dtype = dtype_of(copy, op, "a copy");
  }
  if (m.average.defined()) {
    slot.average = m.average.mutable_data_ptr();
    slot.average_dtype = dtype_of(m.average, op, "an average");
    slot.average_weight = m.average_weight;
  }
  const bool is_there = slot.param && (slot.grad || !m.grad.defined()) &&
                        std::all_of(slot.state, slot.state + count, [](const void* state) { return state; });
  TORCH_CHECK(is_there || slot.numel == 0, op, ": a parameter of shape ", m.param.sizes(),
              ", its gradient or a state has lost its storage; expected memory for its elements");
  return place;
}

size_t Batch::lane(const at::Device& device, int rule) {
  for (size_t i = 0; i < lanes_.size(); ++i)
    if (lanes_[i].device == device && lanes_[i].rule == rule) return i;
  lanes_.push_back({device, rule, {}});
  return lanes_.size() - 1;
}

void Batch::launch(const Lane& lane, const Control* control) {
  run_on(lane.device, "optimizer step", step_cpu, GDBP_CUDA_LAUNCHER(step_cuda), lane.rule, lane.slots.data(),
         int64_t(lane.slots.size()), control);
}

void Batch::finish() {
  for (const Copy& copy : copies_) copy.to.copy_(copy.from);
  // A backward pass through the old values must fail, as it does after torch's own in-place updates.
  for (c10::TensorImpl* impl : written_)
    if (!impl->is_inference()) impl->bump_version();
}

namespace {

// One step over many tensors. states and counts: for each kind that the rule keeps a list of params' length,
// one after the other. lr: instead of hyper's, so that a compiled step need not be compiled again. fresh:
// for rules without counts, which updates are the first.
void step(at::TensorList params, at::TensorList grads, at::TensorList states, at::TensorList counts,
          c10::string_view rule_name, at::ArrayRef<double> hyper_values, const std::optional<Tensor>& lr,
          const c10::List<bool>& fresh, const std::optional<Tensor>& norm) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int rule = parse_rule(rule_name);
  Hyper hyper = parse_hyper(hyper_values.data(), hyper_values.size());
  if (lr) hyper.lr = lr->item<double>();
  const size_t n = params.size(), kinds = rule_states(rule);
  TORCH_CHECK_VALUE(grads.size() == n && states.size() == n * kinds && (fresh.empty() || fresh.size() == n) &&
                        (counts.empty() || counts.size() == n || counts.size() == 2 * n),
                    "optim_step_: got ", n, " params, ", grads.size(), " grads, ", states.size(), " states, ",
                    counts.size(), " counts and ", fresh.size(), " fresh; expected as many grads as params, ", kinds,
                    " states for each, and no or one for each of the others");
  for (const Tensor& count : counts)
    TORCH_CHECK(Counts::fits(count), "optim_step_: a count is on ", count.device(), " with dtype ", count.scalar_type(),
                "; expected one float32 or float64 number on the CPU");
  static thread_local Batch batch;
  batch.clear();
  std::vector<std::pair<Counts, Clock>> ticks;
  for (size_t i = 0; i < n; ++i) {
    Member member{.param = params[i], .grad = grads[i]};
    for (size_t k = 0; k < kinds; ++k) member.states[k] = states[k * n + i];
    Counts count;
    if (!counts.empty()) count.step = counts[i];
    if (counts.size() > n) count.product = counts[n + i];
    count.fresh = !fresh.empty() && fresh[i];
    ticks.emplace_back(count, count.tick(rule, hyper));
    member.clock = ticks.back().second;
    batch.add(rule, &hyper, member);
  }
  const Control* const control = norm ? control_of(*norm) : nullptr;
  const bool skip = norm && norm->device().is_cpu() && control->skip != 0;
  if (!skip) batch.run([&](const at::Device&) { return control; });
  if (!skip)
    for (auto& [count, clock] : ticks) count.set(clock);
  batch.clear();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdbp, m) {
  m.def(
      "optim_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] counts, str rule,"
      " float[] hyper, Tensor? lr, bool[] fresh, Tensor? norm) -> ()",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(gdbp, CPU, m) { m.impl("optim_step_", &step); }
TORCH_LIBRARY_IMPL(gdbp, CUDA, m) { m.impl("optim_step_", &step); }

}  // namespace gdbp::optim
