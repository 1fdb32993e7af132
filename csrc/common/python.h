// Tensors on their way between Python and C++, for the host-side objects that pybind11 binds.
#pragma once
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

namespace gdbp {

// Undefined for what is no tensor.
inline at::Tensor unwrap(const pybind11::handle& object) {
  return object && THPVariable_Check(object.ptr()) ? THPVariable_Unpack(object.ptr()) : at::Tensor();
}

inline pybind11::object wrap(const at::Tensor& tensor) {
  return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(tensor));
}

}  // namespace gdbp
