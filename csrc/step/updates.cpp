#include "step/updates.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <limits>

#include "common/binding.h"
#include "grad/grad_math.h"

namespace gdbp::step {
namespace {

// Elements of a gradient that are formed and used at a time: they stay in a second-level cache.
constexpr int64_t kTileElements = 1 << 18;

}  // namespace

int Updates::add(const at::Tensor& parameter) {
  if (!parameter.defined()) return -1;
  parameters_.push_back(parameter);
  return int(parameters_.size()) - 1;
}

void Updates::find(const StepPlan& plan) {
  entries_.assign(parameters_.size(), -1);
  for (size_t i = 0; i < plan.size(); ++i)
    for (size_t k = 0; k < parameters_.size(); ++k)
      if (plan.param(i).is_same(parameters_[k])) entries_[k] = int(i);
  in_plan_.assign(plan.size(), 0);
  found_in_ = plan.id();
}

Updates::Outcome Updates::collect(StepPlan& plan, const std::vector<Group>& groups, const pybind11::dict& state,
                                  const Options& options) {
  if (plan.id() != found_in_) find(plan);
  std::vector<char> trained(parameters_.size()), divisible(parameters_.size());
  for (size_t k = 0; k < parameters_.size(); ++k) {
    if (entries_[k] < 0) continue;
    trained[k] = in_plan_[entries_[k]] = parameters_[k].requires_grad();
  }
  if (!plan.collect(groups, state, in_plan_)) return Outcome::stale;
  plan_ = &plan;
  // Whether parts of a parameter can be updated on their own.
  for (size_t k = 0; k < parameters_.size(); ++k) divisible[k] = trained[k] && !plan.slot(entries_[k]).has_extra();
  const int threads = at::get_num_threads();
  const bool same = trained == trained_ && divisible == divisible_ && options == options_ && threads == threads_;
  trained_ = std::move(trained);
  divisible_ = std::move(divisible);
  options_ = options;
  threads_ = threads;
  if (!same) lay_flat();
  made_.clear();
  for (size_t k = 0; k < parameters_.size(); ++k) {
    at::Tensor& grad = parameters_[k].mutable_grad();
    if (entries_[k] < 0) continue;
    if (!options.keep || !trained_[k]) {
      grad.reset();
    } else if (options.flat) {
      const int64_t start =
          (static_cast<char*>(places_[k].fixed) - static_cast<char*>(flat_.mutable_data_ptr())) / flat_.element_size();
      grad = flat_.slice(0, start, start + parameters_[k].numel()).view(parameters_[k].sizes());
      made_.push_back(k);
    } else if (!grad.defined() || !grad.is_contiguous() || grad.scalar_type() != parameters_[k].scalar_type() ||
               grad.sizes() != parameters_[k].sizes() || grad.requires_grad()) {
      grad = at::empty_like(parameters_[k], at::MemoryFormat::Contiguous).detach();
      made_.push_back(k);
    }
  }
  return same ? Outcome::same : Outcome::replan;
}

void Updates::retract() {
  for (const size_t k : made_) parameters_[k].mutable_grad().reset();
  made_.clear();
}

void Updates::lay_flat() {
  places_.assign(parameters_.size(), {});
  flat_.reset();
  if (!options_.flat) return;
  constexpr int64_t step = 16;  // elements: each begins at a line of the cache
  std::vector<int64_t> starts;
  int64_t total = 0;
  for (size_t k = 0; k < parameters_.size(); ++k) {
    starts.push_back(total);
    if (trained_[k]) total += (parameters_[k].numel() + step - 1) / step * step;
  }
  // Zeros, as the gaps are reduced as well.
  flat_ = at::zeros({total}, parameters_.empty() ? at::TensorOptions() : parameters_[0].options().requires_grad(false));
  for (size_t k = 0; k < parameters_.size(); ++k)
    if (trained_[k]) places_[k].fixed = static_cast<char*>(flat_.mutable_data_ptr()) + starts[k] * flat_.element_size();
}

void Updates::plan(int parameter, int64_t inner, Arena& arena, int time, int end) {
  if (parameter < 0 || !trained_[parameter]) return;
  Place& p = places_[parameter];
  p = {Arena::kNone, p.fixed};
  if (inner < 0) return;
  const at::Tensor& tensor = parameters_[parameter];
  const int64_t bytes = tensor.numel() * tensor.element_size();
  if (tensor.dim() == 2) {
    const int64_t rows = tensor.size(0), cols = tensor.size(1);
    p.tiles = gemm_tiles(rows, cols, inner);
    while (tensor.numel() / p.tiles > kTileElements && rows / p.tiles > 32) p.tiles *= 2;
    p.by_tile = !options_.wait && divisible_[parameter] && p.tiles > 1;
    if (p.by_tile && !options_.keep) {
      p.scratch = (gemm_tile_rows(rows, p.tiles) * cols * tensor.element_size() + 63) / 64 * 64;
      if (p.scratch * threads_ < bytes) {
        p.buffer = arena.request(p.scratch * threads_, time, time);
        return;
      }
      p.scratch = 0;
    }
  }
  if (!options_.keep && !p.fixed) p.buffer = arena.request(bytes, time, options_.wait ? end : time);
}

void Updates::begin(const Arena& arena) {
  arena_ = &arena;
  squares_ = 0;
  for (size_t k = 0; options_.keep && k < parameters_.size(); ++k)
    if (trained_[k]) parameters_[k].grad().unsafeGetTensorImpl()->bump_version();
}

void* Updates::place(int parameter) const {
  if (parameter < 0 || !trained_[parameter]) return nullptr;
  if (places_[parameter].fixed) return places_[parameter].fixed;
  return options_.keep ? parameters_[parameter].grad().mutable_data_ptr() : arena_->at(places_[parameter].buffer);
}

void Updates::take(int parameter, void* gradient) {
  if (void* const to = place(parameter)) {
    std::memcpy(to, gradient, size_t(parameters_[parameter].nbytes()));
    gradient = to;
  }
  use(parameter, gradient);
}

void Updates::use(int parameter, void* gradient) {
  if (!gradient) return;
  if (!options_.wait) return update(parameter, 0, parameters_[parameter].size(0), gradient);
  plan_->slot(entries_[parameter]).grad = gradient;
  // Now, while it is in cache.
  if (!options_.flat) add_square(parameter);
}

void Updates::add_square(int parameter) {
  const optim::Slot& slot = plan_->slot(entries_[parameter]);
  const grad::Source source{slot.grad, slot.numel, slot.grad_dtype};
  grad::Norm norm;
  grad::norm_cpu(&source, 1, {std::numeric_limits<double>::infinity(), 1, 0}, &norm, nullptr);
  squares_ += norm.total * norm.total;
}

int64_t Updates::thread_number() { return at::get_thread_num(); }

void Updates::update(int parameter, int64_t begin, int64_t end, const void* grad) const {
  const int entry = entries_[parameter];
  optim::Slot part = plan_->slot(entry);
  part.grad = grad;
  const int64_t rows = parameters_[parameter].size(0);
  if (end - begin < rows) {
    const int64_t cols = part.numel / rows;
    const auto advance = [&](void* p, Dtype dtype) { return static_cast<char*>(p) + begin * cols * size_of(dtype); };
    part.param = advance(part.param, part.param_dtype);
    for (int k = 0; k < optim::rule_states(plan_->rule(entry)); ++k)
      part.state[k] = advance(part.state[k], part.state_dtype);
    part.numel = (end - begin) * cols;
  }
  optim::step_cpu(plan_->rule(entry), &part, 1, nullptr, nullptr);
}

grad::Norm Updates::norm(const grad::Limit& limit) {
  for (size_t k = 0; options_.flat && k < parameters_.size(); ++k)
    if (trained_[k]) add_square(int(k));
  return grad::decide(squares_, limit);
}

void Updates::update_all(const grad::Norm& norm) {
  if (norm.skip != 0) return;
  const optim::Control control{norm.coefficient, norm.skip};
  for (size_t k = 0; k < parameters_.size(); ++k)
    if (trained_[k]) optim::step_cpu(plan_->rule(entries_[k]), &plan_->slot(entries_[k]), 1, &control, nullptr);
}

}  // namespace gdbp::step
