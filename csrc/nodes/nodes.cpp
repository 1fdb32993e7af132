#include "nodes/nodes.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/stl.h>

#include "common/python.h"

namespace gdbp::nodes {

namespace py = pybind11;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

// Tensors and parameters themselves: a class of its own may have a say in what is done to it.
bool is_plain(const py::handle& object) {
  static const PyObject* const kTensor = py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
  static const PyObject* const kParameter =
      py::object(py::module_::import("torch.nn").attr("Parameter")).release().ptr();
  const auto* const type = reinterpret_cast<const PyObject*>(Py_TYPE(object.ptr()));
  if (type != kTensor && type != kParameter) return false;
  const Tensor tensor = unwrap(object);
  return (tensor.is_cpu() || tensor.is_cuda()) && tensor.layout() == at::kStrided && !tensor.is_nested();
}

// What gdbp/ops/_function.py calls by this name, but for what only Python knows. recorded: whether a mode is one that
// lets operators through.
bool is_direct(bool recorded, const py::args& tensors) {
  using c10::DispatchKey;
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  // Modes in Python, torch.func and torch.jit.trace.
  constexpr c10::DispatchKeySet listeners(
      {DispatchKey::FuncTorchDynamicLayerFrontMode, DispatchKey::FuncTorchDynamicLayerBackMode, DispatchKey::Tracer});
  const bool has_mode = keys.included_.has(DispatchKey::Python) || c10::impl::dispatch_mode_enabled();
  if (keys.included_.has_any(listeners) || (has_mode && !recorded) || at::impl::torch_function_mode_enabled())
    return false;
  for (const py::handle& tensor : tensors)
    if (!tensor.is_none() && !is_plain(tensor)) return false;
  return true;
}

}  // namespace

void bind(py::module_& module) {
  using WithoutLock = py::call_guard<py::gil_scoped_release>;
  module.def("is_direct", &is_direct);
  module.def("linear", &linear, WithoutLock());
  module.def("mlp", &mlp, WithoutLock());
  module.def("batch_norm", &batch_norm, WithoutLock());
  module.def("pointwise_loss", &pointwise_loss, WithoutLock());
  module.def("bce_with_logits", &bce_with_logits, WithoutLock());
  module.def(
      "cross_entropy",
      [](const Tensor& logits, const Tensor& target, const OptionalTensor& second, const OptionalTensor& share,
         const OptionalTensor& weight, const OptionalTensor& normalizer, const std::string& reduction,
         int64_t ignore_index, double label_smoothing, double z_loss, double softcap, bool empty_is_zero,
         bool inplace) {
        return cross_entropy(logits, target, second, share, weight, normalizer,
                             {reduction, ignore_index, label_smoothing, z_loss, softcap}, empty_is_zero, inplace);
      },
      WithoutLock());
}

}  // namespace gdbp::nodes
