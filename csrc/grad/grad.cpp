#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <c10/core/InferenceMode.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "common/binding.h"
#include "common/python.h"
#include "grad/gradients.h"

namespace gdbp::grad {

namespace py = pybind11;

namespace {

bool is_plain(const at::Tensor& t) {
  const c10::DispatchKeySet keys = t.key_set();
  return (t.is_cpu() || t.is_cuda()) && t.layout() == at::kStrided && is_supported(t.scalar_type()) &&
         !keys.has_any(c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                                            c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize,
                                            c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor}));
}

}  // namespace

std::unique_ptr<Gradients> Gradients::of(const py::list& tensors, bool themselves, bool by_row) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto all = std::make_unique<Gradients>();
  all->tensors_.reserve(tensors.size());
  all->sources_.reserve(tensors.size());
  int64_t position = -1;
  for (const py::handle& object : tensors) {
    ++position;
    const at::Tensor owner = unwrap(object);
    if (!owner.defined()) return nullptr;
    const at::Tensor t = themselves ? owner : owner.grad();
    if (!t.defined()) continue;
    if (!is_plain(t) || (!all->tensors_.empty() && t.device() != all->device_)) return nullptr;
    all->device_ = t.device();
    const bool rows = by_row && t.dim() > 1;
    // Rows are not in one piece in every dense order.
    const bool dense = rows ? t.is_contiguous() : t.is_non_overlapping_and_dense();
    if (!dense) all->copies_.push_back(t.contiguous());
    all->tensors_.push_back(t);
    all->dense_.push_back(dense);
    all->positions_.push_back(position);
    const void* const data = dense ? t.const_data_ptr() : all->copies_.back().const_data_ptr();
    all->sources_.push_back({data, t.numel(), dtype_of(t, "clip_grad", "a gradient")});
    all->in_units_.push_back(all->sources_.back());
    all->in_units_.back().units = t.numel() == 0 ? 0 : rows ? t.size(0) : 1;
  }
  return all;
}

at::ScalarType Gradients::norm_type() const {
  const bool wide = std::any_of(sources_.begin(), sources_.end(), [](auto& s) { return s.dtype == Dtype::float64; });
  return wide ? at::kDouble : at::kFloat;
}

at::Tensor Gradients::workspace(int64_t bytes) const {
  return at::empty({device_.is_cpu() ? 0 : bytes}, at::TensorOptions(at::kByte).device(device_));
}

at::Tensor Gradients::norm(double order, double max_norm) const {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor result = at::empty({3}, at::TensorOptions(at::kDouble).device(device_));
  const at::Tensor space = workspace(norm_workspace_bytes(sources_.data(), int64_t(sources_.size())));
  const Limit limit{max_norm, 1, 0, order};
  const auto on_cpu = [](const Source* s, int64_t n, const Limit& l, Norm* to, void*, void* stream) {
    return norm_cpu(s, n, l, to, stream);
  };
  run_on(device_, "get_total_norm", +on_cpu, GDBP_CUDA_LAUNCHER(norm_cuda), sources_.data(), int64_t(sources_.size()),
         limit, static_cast<Norm*>(result.mutable_data_ptr()), space.mutable_data_ptr());
  return result;
}

at::Tensor Gradients::health() const {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t count = int64_t(sources_.size());
  static_assert(sizeof(Health) == 6 * sizeof(double));
  const at::Tensor result = at::empty({count, 6}, at::TensorOptions(at::kDouble).device(device_));
  const at::Tensor space = workspace(health_workspace_bytes(sources_.data(), count));
  const auto on_cpu = [](const Source* s, int64_t n, Health* to, void*, void* stream) {
    return health_cpu(s, n, to, stream);
  };
  run_on(device_, "gradient_health", +on_cpu, GDBP_CUDA_LAUNCHER(health_cuda), sources_.data(), count,
         static_cast<Health*>(result.mutable_data_ptr()), space.mutable_data_ptr());
  return result;
}

at::Tensor Gradients::unit_norms(double order) const {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t count = int64_t(in_units_.size());
  const auto options = at::TensorOptions(at::kDouble).device(device_);
  const at::Tensor result = at::empty({count_units(in_units_.data(), count)}, options);
  const at::Tensor space = workspace(norm_workspace_bytes(in_units_.data(), count));
  const auto on_cpu = [](const Source* s, int64_t n, double o, double* to, void*, void* stream) {
    return unit_norms_cpu(s, n, o, to, stream);
  };
  run_on(device_, "clip_grad_norm", +on_cpu, GDBP_CUDA_LAUNCHER(unit_norms_cuda), in_units_.data(), count, order,
         result.mutable_data_ptr<double>(), space.mutable_data_ptr());
  return result;
}

at::Tensor Gradients::penalty(double l1, double l2) const {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t count = int64_t(sources_.size());
  const at::Tensor result = at::empty({}, at::TensorOptions(at::kDouble).device(device_));
  const at::Tensor space = workspace(norm_workspace_bytes(sources_.data(), count));
  const auto on_cpu = [](const Source* s, int64_t n, const Penalty& p, double* to, void*, void* stream) {
    return penalty_cpu(s, n, p, to, stream);
  };
  run_on(device_, "penalty", +on_cpu, GDBP_CUDA_LAUNCHER(penalty_cuda), sources_.data(), count, Penalty{l1, l2},
         result.mutable_data_ptr<double>(), space.mutable_data_ptr());
  return result;
}

std::vector<at::Tensor> Gradients::penalty_slope(double l1, double l2, const at::Tensor& upstream) const {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  TORCH_CHECK(upstream.scalar_type() == at::kDouble && upstream.numel() == 1 && upstream.device() == device_,
              "penalty: the upstream gradient is not one float64 number on ", device_);
  std::vector<at::Tensor> results;
  std::vector<void*> outputs;
  for (size_t i = 0, copies = 0; i < tensors_.size(); ++i) {
    results.push_back(at::empty_like(dense_[i] ? tensors_[i] : copies_[copies++]));
    outputs.push_back(results.back().mutable_data_ptr());
  }
  run_on(device_, "penalty", penalty_slope_cpu, GDBP_CUDA_LAUNCHER(penalty_slope_cuda), sources_.data(),
         int64_t(sources_.size()), Penalty{l1, l2}, upstream.const_data_ptr<double>(), outputs.data());
  return results;
}

template <class OnDense, class OnOther>
bool Gradients::write(std::vector<Source> sources, const OnDense& on_dense, const OnOther& on_other) const {
  std::vector<const void*> starts;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    TORCH_CHECK(!tensors_[i].is_inference() || c10::InferenceMode::is_enabled(), "clip_grad: gradient ", positions_[i],
                " is an inference tensor, which only torch.inference_mode() may change; clip there, or clone it");
    if (!dense_[i]) sources[i].numel = 0;
    if (sources[i].numel > 0) starts.push_back(sources[i].data);
  }
  std::sort(starts.begin(), starts.end());
  if (std::adjacent_find(starts.begin(), starts.end()) != starts.end()) return false;
  // The others first: what torch refuses to write in place (expanded memory, say) it refuses before anything
  // has changed.
  for (size_t i = 0; i < tensors_.size(); ++i)
    if (!dense_[i]) on_other(i);
  on_dense(sources);
  for (size_t i = 0; i < tensors_.size(); ++i)
    if (dense_[i]) mark_changed(tensors_[i]);
  return true;
}

void Gradients::check_coefficients(const at::Tensor& coefficients, int64_t expected) const {
  TORCH_CHECK(coefficients.scalar_type() == at::kDouble && coefficients.numel() == expected &&
                  coefficients.device() == device_ && coefficients.is_contiguous(),
              "clip_grad: the coefficients are not ", expected, " contiguous float64 numbers on ", device_);
}

bool Gradients::scale(const at::Tensor& coefficient) const {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  check_coefficients(coefficient, 1);
  const double* const factor = coefficient.const_data_ptr<double>();
  if (device_.is_cpu() && *factor == 1) return true;
  return write(
      sources_,
      [&](const std::vector<Source>& sources) {
        run_on(device_, "clip_grads_with_norm_", scale_cpu, GDBP_CUDA_LAUNCHER(scale_cuda), sources.data(),
               int64_t(sources.size()), factor);
      },
      [&](size_t i) { at::Tensor(tensors_[i]).mul_(coefficient); });
}

bool Gradients::scale_units(const at::Tensor& coefficients) const {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t count = count_units(in_units_.data(), int64_t(in_units_.size()));
  check_coefficients(coefficients, count);
  const double* const factors = coefficients.const_data_ptr<double>();
  if (device_.is_cpu() && std::all_of(factors, factors + count, [](double x) { return x == 1; })) return true;
  return write(
      in_units_,
      [&](const std::vector<Source>& sources) {
        run_on(device_, "clip_grad", scale_units_cpu, GDBP_CUDA_LAUNCHER(scale_units_cuda), sources.data(),
               int64_t(sources.size()), factors);
      },
      [&](size_t i) {
        const int64_t units = in_units_[i].units;
        at::DimVector shape(tensors_[i].dim(), 1);
        if (units > 1) shape[0] = units;
        at::Tensor(tensors_[i])
            .mul_(coefficients.narrow(0, count_units(in_units_.data(), int64_t(i)), units).view(shape));
      });
}

bool Gradients::clamp(double limit) const {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return write(
      sources_,
      [&](const std::vector<Source>& sources) {
        run_on(device_, "clip_grad_value_", clamp_cpu, GDBP_CUDA_LAUNCHER(clamp_cuda), sources.data(),
               int64_t(sources.size()), limit);
      },
      [&](size_t i) { at::Tensor(tensors_[i]).clamp_(-limit, limit); });
}

void bind(py::module_& module) {
  py::class_<Gradients>(module, "Gradients", "The gradients of a list of parameters, for one pass over all of them.")
      .def_static("of", &Gradients::of, py::arg("tensors"), py::arg("themselves") = false, py::arg("by_row") = false)
      .def("norm", [](const Gradients& g, double order, double max) { return wrap(g.norm(order, max)); })
      .def("health", [](const Gradients& g) { return wrap(g.health()); })
      .def("scale", [](const Gradients& g, const py::object& coefficient) { return g.scale(unwrap(coefficient)); })
      .def("clamp", &Gradients::clamp)
      .def("unit_norms", [](const Gradients& g, double order) { return wrap(g.unit_norms(order)); })
      .def("scale_units", [](const Gradients& g, const py::object& by) { return g.scale_units(unwrap(by)); })
      .def("penalty", [](const Gradients& g, double l1, double l2) { return wrap(g.penalty(l1, l2)); })
      .def("penalty_slope",
           [](const Gradients& g, double l1, double l2, const py::object& upstream) {
             py::list slopes;
             for (const at::Tensor& t : g.penalty_slope(l1, l2, unwrap(upstream))) slopes.append(wrap(t));
             return slopes;
           })
      .def_property_readonly("positions", &Gradients::positions)
      .def_property_readonly("is_double", [](const Gradients& g) { return g.norm_type() == at::kDouble; });
}

}  // namespace gdbp::grad
