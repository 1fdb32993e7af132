// The gradients of a list of parameters as C++ sees them: nanoseconds a tensor, where a list handed through the
// dispatcher costs a microsecond.
#pragma once
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "grad/grad.h"

namespace gdbp::grad {

class Gradients {
 public:
  // The gradients of `tensors` that have one, or the tensors themselves. Null where the kernels cannot take
  // them: several devices, or a tensor that is sparse, complex, or of a class that dispatches in Python.
  // by_row: each row of a tensor is a unit, unless it has a single dimension or none; else each tensor is one.
  static std::unique_ptr<Gradients> of(const pybind11::list& tensors, bool themselves, bool by_row);

  // Of all together: the three numbers of Norm, on their device.
  at::Tensor norm(double order, double max_norm) const;
  // (gradients, 6): the numbers of Health.
  at::Tensor health() const;
  // False, and nothing done, where two of them share memory.
  bool scale(const at::Tensor& coefficient) const;
  bool clamp(double limit) const;

  // (units), float64, where a tensor without elements has none; and the units multiplied by as many float64
  // coefficients, as in scale.
  at::Tensor unit_norms(double order) const;
  bool scale_units(const at::Tensor& coefficients) const;

  // Of the values of all together, one float64 number; and its derivatives times upstream, in tensors like them.
  at::Tensor penalty(double l1, double l2) const;
  std::vector<at::Tensor> penalty_slope(double l1, double l2, const at::Tensor& upstream) const;

  const std::vector<int64_t>& positions() const { return positions_; }
  // float32 for half types, whose norm may be beyond them.
  at::ScalarType norm_type() const;

 private:
  // on_dense(sources) for what lies in one piece, of which the others are without elements; on_other(position).
  template <class OnDense, class OnOther>
  bool write(std::vector<Source> sources, const OnDense& on_dense, const OnOther& on_other) const;
  void check_coefficients(const at::Tensor& coefficients, int64_t expected) const;
  at::Tensor workspace(int64_t bytes) const;

  std::vector<at::Tensor> tensors_, copies_;
  std::vector<Source> sources_;
  std::vector<Source> in_units_;    // the same, by unit
  std::vector<int64_t> positions_;  // in the list that this was made of
  std::vector<bool> dense_;
  at::Device device_ = at::kCPU;
};

void bind(pybind11::module_& module);

}  // namespace gdbp::grad
