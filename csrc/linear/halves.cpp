#include "linear/halves.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <pybind11/pybind11.h>

#include <algorithm>

#include "common/binding.h"
#include "common/gemm.h"
#include "linear/linear.h"

namespace gdbp::linear {
namespace {

using at::Tensor;

bool products_allowed = true;

// Below so many multiplications and additions a library's preparations, some 30 us, are longer than the product and
// the conversions.
constexpr int64_t kSmallWork = 1'000'000;
// Of the right operand and the sums so many elements exist in float32 at a time: 32 MB. Columns come in parts of one
// size, as a BLAS is slow where only few are left.
constexpr int64_t kElements = int64_t(1) << 23;
constexpr int64_t kLeastColumns = 256, kColumnStep = 64;

int64_t columns_at_once(int64_t m, int64_t n, int64_t k) {
  const int64_t most = std::max(kElements / (m + k), kLeastColumns), parts = (n + most - 1) / most;
  const int64_t columns = (n + parts - 1) / parts;
  return std::min(n, (columns + kColumnStep - 1) / kColumnStep * kColumnStep);
}

bool ask(const char* name) {
  const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  return !op || op->typed<bool()>().call();
}

Operand operand(const Tensor& x) {
  return x.stride(1) == 1 && x.stride(0) >= x.size(1) ? Operand{x.const_data_ptr(), x.stride(0)}
                                                      : Operand{x.const_data_ptr(), x.stride(1), true};
}

// Whether the processor has instructions for products of `type`, as far as torch's library uses them.
bool library_has_products_of(at::ScalarType type) {
  static const bool bfloat16 = ask("mkldnn::_is_mkldnn_bf16_supported"),
                    float16 = ask("mkldnn::_is_mkldnn_fp16_supported");
  return products_allowed && (type == at::kBFloat16 ? bfloat16 : float16);
}

}  // namespace

Tensor widened(const Tensor& x) {
  if (x.stride(1) != 1 && x.stride(0) == 1) return widened(x.t()).t();
  const Tensor rows = x.stride(1) == 1 ? x : x.contiguous();
  Tensor wide = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  widen_cpu({dtype_of(x, "linear", "input"), x.size(0), x.size(1), rows.stride(0), rows.const_data_ptr(),
             wide.mutable_data_ptr<float>()},
            nullptr);
  return wide;
}

bool is_faster_in_float32(const Tensor& a, const Tensor& b) {
  if (!a.is_cpu() || a.element_size() != 2 || a.numel() == 0 || b.numel() == 0) return false;
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  return !library_has_products_of(a.scalar_type()) ||
         (2 * m * n * k < kSmallWork && gemm_is_faster(Dtype::float32, m, n, k));
}

Tensor product_in_float32(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  const Dtype dtype = dtype_of(a, "linear", "input");
  const Tensor left = widened(a), bias_values = bias ? bias->contiguous() : Tensor();
  Tensor result = on_huge_pages(at::empty({m, n}, a.options()));
  const int64_t most = columns_at_once(m, n, k);
  const Tensor memory = at::empty({m * most}, left.options());
  for (int64_t first = 0; first < n; first += most) {
    const int64_t cols = std::min(most, n - first);
    const Tensor right = widened(b.narrow(1, first, cols));
    Tensor sums = memory.narrow(0, 0, m * cols).view({m, cols});
    if (gemm_is_faster(Dtype::float32, m, cols, k)) {
      gemm(Dtype::float32, m, cols, k, operand(left), operand(right), sums.mutable_data_ptr(), cols);
    } else {
      at::mm_out(sums, left, right);
    }
    const auto at = [&](const Tensor& x) { return static_cast<const char*>(x.const_data_ptr()) + 2 * first; };
    narrow_cpu({dtype, m, cols, sums.const_data_ptr<float>(), bias ? at(bias_values) : nullptr,
                static_cast<char*>(result.mutable_data_ptr()) + 2 * first, n},
               nullptr);
  }
  return result;
}

void bind(pybind11::module_& module) {
  module.def(
      "has_products_of",
      [](const std::string& dtype) {
        TORCH_CHECK_VALUE(dtype == "bfloat16" || dtype == "float16", "has_products_of: dtype is '", dtype,
                          "'; expected bfloat16 or float16");
        return library_has_products_of(dtype == "bfloat16" ? at::kBFloat16 : at::kHalf);
      },
      "Whether this processor has instructions for them; else they are formed in float32.");
  module.def(
      "allow_half_products", [](bool allowed) { products_allowed = allowed; },
      "For tests: false forms them as on processors without such instructions.");
}

}  // namespace gdbp::linear
