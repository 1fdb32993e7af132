#include "step/train.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstring>
#include <exception>

#include "common/binding.h"
#include "common/gemm.h"
#include "common/python.h"
#include "common/random.h"
#include "mlp/mlp.h"

namespace gdbp::step {

namespace py = pybind11;

namespace {

// From (kind, name, ...), as gdbp/step/_model.py describes them.
std::vector<std::unique_ptr<Layer>> make_layers(const py::list& descriptions) {
  std::vector<std::unique_ptr<Layer>> layers;
  std::vector<LinearOptions> strip;
  const auto end_strip = [&] {
    if (!strip.empty()) layers.push_back(make_strip(std::move(strip)));
    strip.clear();
  };
  for (int at = 0; at < int(descriptions.size()); ++at) {
    const auto d = descriptions[at].cast<py::tuple>();
    const auto kind = d[0].cast<std::string>(), name = d[1].cast<std::string>();
    const auto activation = [&](int i) { return parse_activation(d[i].cast<std::string>(), "TrainStep"); };
    if (kind == "linear") {
      LinearOptions linear{name, unwrap(d[2]), unwrap(d[3]), activation(4)};
      if (!fits_strip(strip, linear)) end_strip();
      if (fits_strip(strip, linear)) {
        strip.push_back(std::move(linear));
      } else {
        layers.push_back(make_linear(std::move(linear)));
      }
      continue;
    }
    if (kind == "dropout" && !strip.empty() && strip.back().dropout == 0) {
      strip.back().dropout = d[2].cast<double>();
      strip.back().dropout_index = at;
      continue;
    }
    end_strip();
    if (kind == "batch_norm") {
      layers.push_back(make_batch_norm(
          name, d[2].cast<int64_t>(), {unwrap(d[3]), unwrap(d[4]), unwrap(d[5]), unwrap(d[6]), unwrap(d[7])},
          {d[8].cast<double>(), d[9].cast<std::optional<double>>(), d[10].cast<bool>(), activation(11)}));
    } else if (kind == "dropout") {
      // Its mask depends on where it is in the network.
      layers.push_back(make_dropout(name, d[2].cast<double>(), at));
    } else {
      layers.push_back(make_activation(name, activation(2)));
    }
  }
  end_strip();
  return layers;
}

Target describe(const at::Tensor& target, const void* data) {
  TORCH_CHECK_VALUE(target.is_cpu(), "TrainStep: target is on ", target.device(), "; expected cpu, as the input");
  return {data, target.scalar_type(), at::DimVector(target.sizes())};
}

at::Tensor tensor_of(const std::vector<grad::Norm>& norms) {
  const auto rows = int64_t(norms.size());
  const at::Tensor out = at::empty({rows, 3}, at::TensorOptions(at::kDouble));
  static_assert(sizeof(grad::Norm) == 3 * sizeof(double));
  std::memcpy(out.mutable_data_ptr(), norms.data(), norms.size() * sizeof(grad::Norm));
  return out;
}

// Row `index[i]` of `from` to row i of `to`.
void gather(const at::Tensor& from, const int64_t* index, int64_t count, at::Tensor& to) {
  const int64_t bytes = from.size(0) ? int64_t(from.nbytes()) / from.size(0) : 0;
  if (!to.defined() || int64_t(to.nbytes()) < count * bytes)
    to = at::empty({count * bytes}, at::TensorOptions(at::kByte));
  const char* const source = static_cast<const char*>(from.const_data_ptr());
  char* const target = static_cast<char*>(to.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i) std::memcpy(target + i * bytes, source + index[i] * bytes, size_t(bytes));
}

// What was made for a step goes again if that fails.
class Retraction {
 public:
  explicit Retraction(Updates& updates) : updates_(updates), before_(std::uncaught_exceptions()) {}
  ~Retraction() {
    if (std::uncaught_exceptions() > before_) updates_.retract();
  }

 private:
  Updates& updates_;
  const int before_;
};

constexpr auto kSignalInterval = std::chrono::milliseconds(100);

}  // namespace

TrainPlan::TrainPlan(const py::list& layers, const py::tuple& objective, Watched watched, bool flattens,
                     int output_dims)
    : watched_(std::move(watched)),
      flattens_(flattens),
      output_dims_(output_dims),
      network_(make_layers(layers), make_objective(objective)) {}

bool TrainPlan::collect(StepPlan& plan, const std::vector<Group>& groups, const py::dict& state,
                        const Updates::Options& options) {
  const Updates::Outcome outcome = network_.updates.collect(plan, groups, state, options);
  replan_ = replan_ || outcome == Updates::Outcome::replan;
  return outcome != Updates::Outcome::stale;
}

void TrainPlan::ready(const at::Tensor& input, int64_t rows, const Target& target) {
  TORCH_CHECK_VALUE(input.is_cpu() && (input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble),
                    "TrainStep: input has dtype ", input.scalar_type(), " on ", input.device(),
                    "; expected float32 or float64 on cpu; convert it with .to(), or use strict=False");
  TORCH_CHECK_VALUE(input.dim() == 2 || (flattens_ && input.dim() > 2), "TrainStep: input has shape ", input.sizes(),
                    "; expected (rows, features)", flattens_ ? " or more dimensions for Flatten" : "",
                    "; reshape it, or use strict=False");
  TORCH_CHECK_VALUE(input.numel() == 0 || input.const_data_ptr(), "TrainStep: input has lost its storage");
  const int64_t cols = c10::multiply_integers(input.sizes().slice(1));
  const Dtype dtype = input.scalar_type() == at::kDouble ? Dtype::float64 : Dtype::float32;
  if (replan_ || !network_.is_planned_for(dtype, rows, cols)) {
    replan_ = true;
    network_.plan(dtype, rows, cols, output_dims_);
    replan_ = false;
  }
  network_.check();
  network_.objective().check(network_.output(), target);
}

bool TrainPlan::finish(bool waits, const Limit& limit, grad::Norm* norm) {
  grad::Norm decided{0, 1, 0};
  if (limit) *norm = decided = network_.updates.norm({limit->first, 1, double(limit->second)});
  network_.updates.settle();
  if (waits) network_.updates.update_all(decided);
  network_.finish();
  return decided.skip == 0;
}

template <class Then>
at::Tensor TrainPlan::run(const at::Tensor& input, const at::Tensor& target, uint64_t seed, uint64_t number,
                          const Then& then) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  TORCH_CHECK_TYPE(input.defined() && target.defined(), "TrainStep: the ", input.defined() ? "target" : "input",
                   " is no tensor; expected two; make one with torch.as_tensor");
  const Retraction unless_done(network_.updates);
  const at::Tensor x = input.resolve_neg().contiguous(), y = target.resolve_neg().contiguous();
  const Target described = describe(y, y.const_data_ptr());
  ready(x, x.dim() ? x.size(0) : 0, described);
  const at::Tensor loss = at::empty({}, x.options());
  const py::gil_scoped_release no_gil;
  network_.run(x.const_data_ptr(), described, combine_seed(seed, number), loss.mutable_data_ptr());
  then();
  return loss;
}

py::tuple TrainPlan::step(StepPlan& plan, const at::Tensor& input, const at::Tensor& target, const Limit& limit,
                          uint64_t seed, uint64_t number) {
  std::vector<grad::Norm> norms(limit ? 1 : 0);
  bool counts = false;
  const at::Tensor loss = run(input, target, seed, number, [&] {
    counts = finish(limit.has_value(), limit, norms.data());
    plan.settle(counts);
  });
  ++completed_;
  return py::make_tuple(wrap(loss), limit ? wrap(tensor_of(norms)) : py::none(), counts);
}

std::pair<at::Tensor, at::Tensor> TrainPlan::backward(const at::Tensor& input, const at::Tensor& target, uint64_t seed,
                                                      uint64_t number) {
  const at::Tensor loss = run(input, target, seed, number, [] {});
  return {loss, network_.updates.flat()};
}

py::tuple TrainPlan::update(StepPlan& plan, const Limit& limit) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  std::vector<grad::Norm> norms(limit ? 1 : 0);
  const bool counts = finish(true, limit, norms.data());
  plan.settle(counts);
  ++completed_;
  return py::make_tuple(limit ? wrap(tensor_of(norms)) : py::none(), counts);
}

py::tuple TrainPlan::many(StepPlan& plan, const at::Tensor& all_inputs, const at::Tensor& all_targets,
                          const at::Tensor& index, int64_t size, const Limit& limit, uint64_t seed, uint64_t first) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Retraction unless_done(network_.updates);
  const at::Tensor inputs = all_inputs.resolve_neg(), targets = all_targets.resolve_neg();
  const int64_t total = index.defined() ? index.size(0) : inputs.size(0);
  const int64_t steps = (total + size - 1) / size;
  const at::Tensor losses = at::empty({steps}, inputs.options());
  std::vector<grad::Norm> norms(limit ? steps : 0);
  bool any = false;
  // What does not fit is better said before the first step: also that the last one has too few rows.
  for (const int64_t rows : {total % size, std::min(size, total)}) {
    if (rows == 0) continue;
    Target target = describe(targets, nullptr);
    target.sizes[0] = rows;
    ready(inputs, rows, target);
  }
  {
    const py::gil_scoped_release no_gil;
    if (targets.scalar_type() == at::kLong)
      network_.objective().check_labels(targets.const_data_ptr<int64_t>(),
                                        index.defined() ? index.const_data_ptr<int64_t>() : nullptr, total,
                                        network_.output().cols);
    auto looked = std::chrono::steady_clock::now();
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t begin = step * size, rows = std::min(size, total - begin);
      const void* data[2];
      for (const int part : {0, 1}) {
        const at::Tensor& all = part ? targets : inputs;
        if (index.defined()) {
          gather(all, index.const_data_ptr<int64_t>() + begin, rows, gathered_[part]);
          data[part] = gathered_[part].const_data_ptr();
        } else {
          data[part] = static_cast<const char*>(all.const_data_ptr()) +
                       (all.size(0) ? begin * (int64_t(all.nbytes()) / all.size(0)) : 0);
        }
      }
      Target target = describe(targets, data[1]);
      target.sizes[0] = rows;
      ready(inputs, rows, target);
      network_.run(data[0], target, combine_seed(seed, first + step),
                   static_cast<char*>(losses.mutable_data_ptr()) + step * losses.element_size());
      const bool counts = finish(limit.has_value(), limit, limit ? &norms[step] : nullptr);
      any = any || counts;
      if (step + 1 < steps) {
        plan.advance(counts);
      } else {
        plan.settle(counts);
      }
      ++completed_;
      if (std::chrono::steady_clock::now() - looked < kSignalInterval) continue;
      looked = std::chrono::steady_clock::now();
      const py::gil_scoped_acquire gil;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
  }
  return py::make_tuple(wrap(losses), limit ? wrap(tensor_of(norms)) : py::none(), any);
}

std::tuple<int64_t, int64_t, int64_t> TrainPlan::memory() const {
  return {network_.output().rows, network_.arena().size(), network_.arena().size_unshared()};
}

void bind_train(py::module_& module) {
  module.attr("MOST_NARROW") = int(mlp::kMaxWidth);
  module.attr("MOST_LAYERS") = int(mlp::kMaxLayers);
  module.def("gemm_name", &gemm_name, "What computes TrainStep's matrix products.");
  module.def("allow_blas", &allow_blas, "For tests: false computes them by at::mm, as other builds of torch do.");
  module.def(
      "step_seed", [](uint64_t seed, uint64_t number) { return int64_t(combine_seed(seed, number)); },
      "Of dropout in a run's step, as an int64 tensor takes it.");
  py::class_<TrainPlan>(module, "TrainPlan", "A model, its loss and its optimizer, ready for whole training steps.")
      .def(py::init([](const py::list& layers, const py::tuple& objective, const py::list& values,
                       const py::list& lengths, bool flattens, int output_dims) {
             return std::make_unique<TrainPlan>(layers, objective, Watched(values, lengths), flattens, output_dims);
           }),
           py::arg("layers"), py::arg("objective"), py::arg("values"), py::arg("lengths"), py::arg("flattens"),
           py::arg("output_dims"))
      .def("unchanged", &TrainPlan::unchanged)
      .def("collect",
           [](TrainPlan& self, StepPlan& plan, const std::vector<Group>& groups, const py::dict& state, bool keep,
              bool wait, bool flat) { return self.collect(plan, groups, state, {keep, wait, flat}); })
      .def("step", [](TrainPlan& self, StepPlan& plan, const py::object& input, const py::object& target,
                      const TrainPlan::Limit& limit, uint64_t seed,
                      uint64_t number) { return self.step(plan, unwrap(input), unwrap(target), limit, seed, number); })
      .def("backward",
           [](TrainPlan& self, const py::object& input, const py::object& target, uint64_t seed, uint64_t number) {
             const auto [loss, gradients] = self.backward(unwrap(input), unwrap(target), seed, number);
             return py::make_tuple(wrap(loss), wrap(gradients));
           })
      .def("update", &TrainPlan::update)
      .def("many",
           [](TrainPlan& self, StepPlan& plan, const py::object& inputs, const py::object& targets,
              const py::object& index, int64_t size, const TrainPlan::Limit& limit, uint64_t seed, uint64_t first) {
             return self.many(plan, unwrap(inputs), unwrap(targets), unwrap(index), size, limit, seed, first);
           })
      .def("completed", &TrainPlan::completed)
      .def("memory", &TrainPlan::memory);
}

}  // namespace gdbp::step
