// What a plan was made of, in Python's objects, and must find again before each step.
#pragma once
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/variable.h>

#include <utility>
#include <vector>

#include "common/python.h"

namespace gdbp::step {

class Watched {
 public:
  // values: (dict, key, value) that must stay as they are, and tensors among them without other hooks; lengths: (dict,
  // length), likewise.
  Watched(const pybind11::list& values, const pybind11::list& lengths) {
    for (const pybind11::handle& handle : values) {
      const auto triple = handle.cast<pybind11::tuple>();
      values_.push_back({triple[0], triple[1], triple[2]});
      if (const at::Tensor tensor = unwrap(triple[2]); tensor.defined())
        tensors_.emplace_back(tensor, hooks_of(tensor));
    }
    for (const pybind11::handle& handle : lengths) {
      const auto pair = handle.cast<pybind11::tuple>();
      lengths_.emplace_back(pair[0], pair[1].cast<Py_ssize_t>());
    }
  }

  // Identity is enough: references are held, so no address can have been used again.
  bool unchanged() const {
    for (const Value& v : values_)
      if (PyDict_GetItemWithError(v.dict.ptr(), v.key.ptr()) != v.value.ptr()) return false;
    for (const auto& [dict, size] : lengths_)
      if (PyDict_Size(dict.ptr()) != size) return false;
    for (const auto& [tensor, hooks] : tensors_)
      if (hooks_of(tensor) != hooks) return false;
    return true;
  }

 private:
  // What torch was given to call for a tensor's gradient; each may stand for a dict of them, or for an empty one.
  static size_t hooks_of(const at::Tensor& tensor) {
    const torch::autograd::AutogradMeta* const meta = torch::autograd::impl::get_autograd_meta(tensor);
    return meta ? meta->hooks_.size() + (meta->post_acc_grad_hooks_ != nullptr) : 0;
  }
  struct Value {
    pybind11::object dict, key, value;
  };
  std::vector<Value> values_;
  std::vector<std::pair<pybind11::object, Py_ssize_t>> lengths_;
  std::vector<std::pair<at::Tensor, size_t>> tensors_;
};

}  // namespace gdbp::step
