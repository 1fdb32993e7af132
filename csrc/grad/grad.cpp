#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
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

std::unique_ptr<Gradients> Gradients::of(const py::list& tensors, bool themselves) {
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
    const bool dense = t.is_non_overlapping_and_dense();
    if (!dense) all->copies_.push_back(t.contiguous());
    all->tensors_.push_back(t);
    all->dense_.push_back(dense);
    all->positions_.push_back(position);
    const void* const data = dense ? t.const_data_ptr() : all->copies_.back().const_data_ptr();
    all->sources_.push_back({data, t.numel(), dtype_of(t, "clip_grad", "a gradient")});
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

template <class OnDense, class OnOther>
bool Gradients::write(const OnDense& on_dense, const OnOther& on_other) const {
  std::vector<Source> sources;
  std::vector<const void*> starts;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (!dense_[i] || sources_[i].numel == 0) continue;
    sources.push_back(sources_[i]);
    starts.push_back(sources_[i].data);
  }
  std::sort(starts.begin(), starts.end());
  if (std::adjacent_find(starts.begin(), starts.end()) != starts.end()) return false;
  // The others first: what torch refuses to write in place (expanded memory, say) it refuses before anything
  // has changed.
  for (size_t i = 0; i < tensors_.size(); ++i)
    if (!dense_[i]) on_other(tensors_[i]);
  on_dense(sources);
  for (size_t i = 0; i < tensors_.size(); ++i)
    if (dense_[i] && !tensors_[i].is_inference()) tensors_[i].unsafeGetTensorImpl()->bump_version();
  return true;
}

bool Gradients::scale(const at::Tensor& coefficient) const {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  TORCH_CHECK(coefficient.scalar_type() == at::kDouble && coefficient.numel() == 1 && coefficient.device() == device_,
              "clip_grads_with_norm_: the coefficient is not one float64 number on ", device_);
  const double* const factor = coefficient.const_data_ptr<double>();
  if (device_.is_cpu() && *factor == 1) return true;
  return write(
      [&](const std::vector<Source>& sources) {
        run_on(device_, "clip_grads_with_norm_", scale_cpu, GDBP_CUDA_LAUNCHER(scale_cuda), sources.data(),
               int64_t(sources.size()), factor);
      },
      [&](at::Tensor t) { t.mul_(coefficient); });
}

bool Gradients::clamp(double limit) const {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return write(
      [&](const std::vector<Source>& sources) {
        run_on(device_, "clip_grad_value_", clamp_cpu, GDBP_CUDA_LAUNCHER(clamp_cuda), sources.data(),
               int64_t(sources.size()), limit);
      },
      [&](at::Tensor t) { t.clamp_(-limit, limit); });
}

void bind(py::module_& module) {
  py::class_<Gradients>(module, "Gradients", "The gradients of a list of parameters, for one pass over all of them.")
      .def_static("of", &Gradients::of, py::arg("tensors"), py::arg("themselves") = false)
      .def("norm", [](const Gradients& g, double order, double max) { return wrap(g.norm(order, max)); })
      .def("health", [](const Gradients& g) { return wrap(g.health()); })
      .def("scale", [](const Gradients& g, const py::object& coefficient) { return g.scale(unwrap(coefficient)); })
      .def("clamp", &Gradients::clamp)
      .def_property_readonly("positions", &Gradients::positions)
      .def_property_readonly("is_double", [](const Gradients& g) { return g.norm_type() == at::kDouble; });
}

}  // namespace gdbp::grad
