// What a plan was made of, in Python's objects, and must find again before each step.
#pragma once
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

namespace gdbp::step {

class Watched {
 public:
  // values: (dict, key, value) that must stay as they are; lengths: (dict, length), likewise.
  Watched(const pybind11::list& values, const pybind11::list& lengths) {
    for (const pybind11::handle& handle : values) {
      const auto triple = handle.cast<pybind11::tuple>();
      values_.push_back({triple[0], triple[1], triple[2]});
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
    return true;
  }

 private:
  struct Value {
    pybind11::object dict, key, value;
  };
  std::vector<Value> values_;
  std::vector<std::pair<pybind11::object, Py_ssize_t>> lengths_;
};

}  // namespace gdbp::step
