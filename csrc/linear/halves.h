// Products of bfloat16 and float16 on the CPU in float32, rounded once: for processors without instructions for them,
// where a library computes element by element, and for small ones, where its preparations outlast the product.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace pybind11 {
class module_;
}

namespace gdbp::linear {

// A matrix of a half type in float32, its elements in the same order where they lie by rows or by columns.
at::Tensor widened(const at::Tensor& x);

// Whether a (m, k) b (k, n) takes less time this way than through at::mm.
bool is_faster_in_float32(const at::Tensor& a, const at::Tensor& b);

// a @ b, plus the bias (n,) where there is one, in their dtype, a half type. None of them empty.
at::Tensor product_in_float32(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias);

void bind(pybind11::module_& module);

}  // namespace gdbp::linear
