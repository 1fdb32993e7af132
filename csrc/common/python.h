// Tensors on their way between Python and C++, for the host-side objects that pybind11 binds.
#pragma once
#include <ATen/core/Tensor.h>
// Not torch/csrc/autograd/python_variable.h, which takes the compiler 6 s longer.
#include <torch/csrc/utils/pybind.h>

#include <utility>

namespace gdbp {

// Undefined for what is no tensor.
inline at::Tensor unwrap(const pybind11::handle& object) {
  pybind11::detail::type_caster<at::Tensor> caster;
  return object && caster.load(object, false) ? std::move(static_cast<at::Tensor&>(caster)) : at::Tensor();
}

inline pybind11::object wrap(const at::Tensor& tensor) { return pybind11::cast(tensor); }

}  // namespace gdbp
