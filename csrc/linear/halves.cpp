#include "linear/halves.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
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

// Below so many multiplications and additions a library's preparations, 20 to 30 us, are longer than the product and
// the conversions (a Zen 4: 64x128 by 128x64 in 18 us of 24; even at twice as many).
constexpr int64_t kSmallWork = 1'500'000;
// So many elements of each operand, and of the sums, exist in float32 at a time: 16 MB.
constexpr int64_t kElements = int64_t(1) << 22, kMostDepth = 4096, kLeastColumns = 256, kStep = 64;

// The parts that a side is cut into are of one size: a BLAS is slow where only few rows or columns are left.
int64_t part_of(int64_t size, int64_t most) {
  const int64_t parts = (size + most - 1) / most, part = (size + parts - 1) / parts;
  return parts == 1 ? size : (part + kStep - 1) / kStep * kStep;
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
  const int64_t depth = part_of(k, kMostDepth), rows = part_of(m, kElements / std::max(depth, kLeastColumns)),
                cols = part_of(n, kElements / std::max(depth, rows));
  const Dtype dtype = dtype_of(a, "linear", "input");
  const Tensor bias_values = bias ? bias->contiguous() : Tensor();
  Tensor result = on_huge_pages(at::empty({m, n}, a.options()));
  const Tensor left = depth == k && rows == m ? widened(a) : Tensor();
  const auto add_part = [&](Tensor& sums, int64_t row, int64_t col, int64_t from) {
    const int64_t height = sums.size(0), width = sums.size(1), length = std::min(depth, k - from);
    const bool whole = length == k && height == m;
    const Tensor x = whole ? left : widened(a.narrow(0, row, height).narrow(1, from, length)),
                 y = widened(b.narrow(0, from, length).narrow(1, col, width));
    if (length == k && gemm_is_faster(Dtype::float32, height, width, k)) {
      gemm(Dtype::float32, height, width, k, operand(x), operand(y), sums.mutable_data_ptr(), width);
    } else if (from == 0) {
      at::mm_out(sums, x, y);
    } else {
      at::addmm_out(sums, sums, x, y);
    }
  };
  for (int64_t col = 0; col < n; col += cols) {
    const int64_t width = std::min(cols, n - col);
    for (int64_t row = 0; row < m; row += rows) {
      Tensor sums = at::empty({std::min(rows, m - row), width}, a.options().dtype(at::kFloat));
      for (int64_t from = 0; from < k; from += depth) add_part(sums, row, col, from);
      narrow_cpu({dtype, sums.size(0), width, sums.const_data_ptr<float>(),
                  bias ? static_cast<const char*>(bias_values.const_data_ptr()) + 2 * col : nullptr,
                  static_cast<char*>(result.mutable_data_ptr()) + 2 * (row * n + col), n},
                 nullptr);
    }
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
