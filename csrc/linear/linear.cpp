#include "linear/linear.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

#include <array>
#include <vector>

#include "common/binding.h"
#include "common/gemm.h"
#include "linear/halves.h"

namespace gdbp::linear {
namespace {

using at::Tensor;

// The names of the activations whose backward pass needs "nothing", the "output", or the pre-activation, "pre".
std::vector<std::string> activations_that_save(c10::string_view what) {
  constexpr const char* kSavedNames[] = {"nothing", "output", "pre"};
  std::vector<std::string> names;
  for (Activation activation : kActivations)
    if (what == kSavedNames[int(saves(activation))]) names.emplace_back(kActivationNames[int(activation)]);
  return names;
}

// Not reshape({-1, ...}), which cannot tell the number of rows where they are empty.
Tensor as_matrix(const Tensor& x) {
  if (x.dim() == 2) return x;
  return x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2);
}

Tensor as_batch(const Tensor& matrix, const Tensor& like) {
  if (like.dim() == 2) return matrix;
  auto sizes = like.sizes().vec();
  sizes.back() = matrix.size(1);
  return at::_unsafe_view(matrix, sizes);
}

// The dtypes here are final: autocast has to keep its hands off the products, too.
struct BelowAutogradAndAutocast {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

void check(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  dtype_of(input, "linear", "input");
  TORCH_CHECK(weight.dim() == 2, "linear: weight has ", weight.dim(),
              " dimensions; expected 2, (out_features, in_features)");
  TORCH_CHECK(input.dim() >= 1 && input.size(-1) == weight.size(1), "linear: input has shape ", input.sizes(),
              " and weight ", weight.sizes(),
              "; expected the input's last dimension to be in_features = ", weight.size(1));
  check_same(input, "input", weight, "weight", "linear");
  if (bias) {
    check_same(input, "input", *bias, "bias", "linear");
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "linear: bias has shape ", bias->sizes(),
                "; expected (", weight.size(0), ",), one value for each row of weight");
  }
}

// A matrix as a BLAS takes it, where it does: by rows, or by columns.
std::optional<Operand> as_operand(const Tensor& x) {
  const int64_t rows = x.size(0), cols = x.size(1);
  if ((x.stride(1) == 1 || cols == 1) && (x.stride(0) >= cols || rows == 1))
    return Operand{x.const_data_ptr(), rows == 1 ? cols : x.stride(0)};
  if (x.stride(0) == 1 && x.stride(1) >= rows) return Operand{x.const_data_ptr(), x.stride(1), true};
  return std::nullopt;
}

// A small product with the arguments of at::mm, which would take as long again to come to it; undefined where it would
// not, or has to do it.
Tensor small_product(const Tensor& a, const Tensor& b) {
  const int64_t m = a.size(0), n = b.size(1), k = a.size(1);
  const Dtype dtype = dtype_of(a, "linear", "input");
  if (!a.is_cpu() || k == 0 || !gemm_is_faster(dtype, m, n, k)) return {};
  const std::optional<Operand> left = as_operand(a), right = as_operand(b);
  if (!left || !right) return {};
  Tensor result = at::empty({m, n}, a.options());
  gemm(dtype, m, n, k, *left, *right, result.mutable_data_ptr(), n);
  return result;
}

// a @ b, plus the bias where there is one.
Tensor library_product(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias = std::nullopt) {
  if (is_faster_in_float32(a, b)) return product_in_float32(a, b, bias);
  if (a.size(0) * b.size(1) * a.element_size() < kLargeBytes) return bias ? at::addmm(*bias, a, b) : at::mm(a, b);
  Tensor result = on_huge_pages(at::empty({a.size(0), b.size(1)}, a.options()));
  return bias ? at::addmm_out(result, *bias, a, b) : at::mm_out(result, a, b);
}

Tensor product(const Tensor& a, const Tensor& b) {
  const Tensor small = small_product(a, b);
  return small.defined() ? small : library_product(a, b);
}

// The output and, where it is kept, the pre-activation (else undefined).
std::pair<Tensor, Tensor> compute(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                  c10::string_view activation_name, bool keep_pre) {
  const BelowAutogradAndAutocast guard;
  const Activation activation = parse_activation(activation_name, "linear");
  check(input, weight, bias);
  const Tensor x = as_matrix(input);
  Tensor pre = small_product(x, weight.t());
  // The library adds the bias where there is no activation, hence no pass of ours to do it in, and for half
  // types, whose product would be rounded before the sum: where the two cancel, few digits would be left.
  const bool add_bias_here = bias && (pre.defined() || (activation != Activation::none && input.element_size() > 2));
  if (!pre.defined()) pre = library_product(x, weight.t(), add_bias_here ? std::nullopt : bias);
  if (activation == Activation::none && !keep_pre && !add_bias_here) return {as_batch(pre, input), Tensor()};
  const Tensor output = keep_pre ? on_huge_pages(at::empty_like(pre)) : pre;
  const Tensor bias_values = add_bias_here ? bias->contiguous() : Tensor();
  const Forward args{dtype_of(pre, "linear", "input"),
                     activation,
                     pre.size(0),
                     pre.size(1),
                     pre.mutable_data_ptr(),
                     add_bias_here ? bias_values.const_data_ptr() : nullptr,
                     output.mutable_data_ptr()};
  run_on(input.device(), "linear", forward_cpu, GDBP_CUDA_LAUNCHER(forward_cuda), args);
  return {as_batch(output, input), keep_pre ? as_batch(pre, input) : Tensor()};
}

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               c10::string_view activation) {
  return compute(input, weight, bias, activation, false).first;
}

std::tuple<Tensor, Tensor> forward_with_pre(const Tensor& input, const Tensor& weight,
                                            const std::optional<Tensor>& bias, c10::string_view activation) {
  return compute(input, weight, bias, activation, true);
}

// Gradients of input, weight and bias, each only where its mask is set (else undefined). over_saved: whether that of
// the pre-activation takes the place of what was saved.
std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                             const Tensor& saved, c10::string_view activation_name,
                                             std::array<bool, 3> mask, bool over_saved) {
  const BelowAutogradAndAutocast guard;
  const Activation activation = parse_activation(activation_name, "linear");
  check(input, weight, std::nullopt);
  check_same(input, "input", grad_output, "grad_output", "linear_backward");
  at::DimVector expected(input.sizes());
  expected.back() = weight.size(0);
  TORCH_CHECK(grad_output.sizes() == at::IntArrayRef(expected), "linear_backward: grad_output has shape ",
              grad_output.sizes(), "; expected ", at::IntArrayRef(expected), ", the shape of linear(input, weight)");
  const Tensor g = as_matrix(grad_output).contiguous();
  const Tensor x = as_matrix(input);
  const bool through_activation = activation != Activation::none;
  Tensor kept;
  if (saves(activation) != Saved::nothing) {
    check_same(input, "input", saved, "saved", "linear_backward");
    kept = saved.contiguous();
    TORCH_CHECK(kept.numel() == g.numel(), "linear_backward: saved has shape ", saved.sizes(),
                "; expected the shape of grad_output");
  }

  const Tensor grad_pre = !through_activation            ? g
                          : over_saved && kept.defined() ? kept.view(g.sizes())
                                                         : on_huge_pages(at::empty_like(g));
  Tensor grad_bias, workspace;
  void* scratch = nullptr;
  const Dtype dtype = dtype_of(g, "linear_backward", "grad_output");
  if (mask[2]) {
    grad_bias = at::empty({g.size(1)}, g.options());
    const int64_t bytes = workspace_bytes(dtype, g.size(0), g.size(1));
    // A tensor costs as much as a small layer's sums.
    static thread_local std::vector<double> kept_scratch(1024);
    if (g.is_cpu() && bytes <= int64_t(kept_scratch.size() * sizeof(double))) {
      scratch = kept_scratch.data();
    } else {
      workspace = at::empty({bytes}, g.options().dtype(at::kByte));
      scratch = workspace.mutable_data_ptr();
    }
  }
  if (through_activation || mask[2]) {
    const Backward args{dtype,
                        activation,
                        g.size(0),
                        g.size(1),
                        g.const_data_ptr(),
                        kept.defined() ? kept.const_data_ptr() : nullptr,
                        through_activation ? grad_pre.mutable_data_ptr() : nullptr,
                        mask[2] ? grad_bias.mutable_data_ptr() : nullptr,
                        scratch};
    run_on(g.device(), "linear_backward", backward_cpu, GDBP_CUDA_LAUNCHER(backward_cuda), args);
  }
  Tensor grad_input, grad_weight;
  if (mask[0]) grad_input = as_batch(product(grad_pre, weight), input);
  if (mask[0] && input.dim() == 1) grad_input = grad_input.view(input.sizes());
  if (mask[1]) grad_weight = product(grad_pre.t(), x);
  return {grad_input, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                            const Tensor& saved, c10::string_view activation,
                                            std::array<bool, 3> mask) {
  return gradients(grad_output, input, weight, saved, activation, mask, false);
}

std::tuple<Tensor, Tensor, Tensor> backward_over_saved(const Tensor& grad_output, const Tensor& input,
                                                       const Tensor& weight, Tensor saved, c10::string_view activation,
                                                       std::array<bool, 3> mask) {
  mark_changed(saved);
  return gradients(grad_output, input, weight, saved, activation, mask, true);
}

// On the CPU alone.
void wide_(const Tensor& output, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Dtype dtype = dtype_of(weight, "linear_wide_", "weight");
  check_same(weight, "weight", input, "input", "linear_wide_");
  if (bias) check_same(weight, "weight", *bias, "bias", "linear_wide_");
  TORCH_CHECK_TYPE(output.scalar_type() == compute_type(weight), "linear_wide_: output has dtype ",
                   output.scalar_type(), "; expected ", compute_type(weight), " for a weight of ", weight.scalar_type(),
                   "; allocate it so");
  TORCH_CHECK_VALUE(input.dim() == 2 && weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0 &&
                        input.size(1) == weight.size(1) && (!bias || bias->sizes() == weight.sizes().slice(0, 1)) &&
                        output.sizes() == at::IntArrayRef({input.size(0), weight.size(0)}) && output.is_contiguous(),
                    "linear_wide_: input has shape ", input.sizes(), ", weight ", weight.sizes(), " and output ",
                    output.sizes(), "; expected (N, in), (out, in), none of them 0, and (N, out), contiguous");
  const auto wide = [](const Tensor& x) { return (x.element_size() == 2 ? widened(x) : x).contiguous(); };
  const Tensor x = wide(input), w = weight.contiguous();
  const Tensor b = bias ? wide(bias->unsqueeze(0)) : Tensor();
  wide_cpu({dtype, x.size(0), x.size(1), w.size(0), x.const_data_ptr(), w.const_data_ptr(),
            b.defined() ? b.const_data_ptr() : nullptr, output.mutable_data_ptr()},
           nullptr);
  mark_changed(output);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdbp, m) {
  m.def("linear_wide_(Tensor(a!) output, Tensor input, Tensor weight, Tensor? bias) -> ()",
        {at::Tag::pt2_compliant_tag});
  m.def("activations_that_save(str what) -> str[]", &activations_that_save);
  m.def("linear(Tensor input, Tensor weight, Tensor? bias, str activation) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("linear_with_pre(Tensor input, Tensor weight, Tensor? bias, str activation) -> (Tensor output, Tensor pre)",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "linear_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor saved, str activation, bool[3] mask)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "linear_backward_over_saved(Tensor grad_output, Tensor input, Tensor weight, Tensor(a!) saved, str activation,"
      " bool[3] mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(gdbp, CPU, m) {
  m.impl("linear", &forward);
  m.impl("linear_with_pre", &forward_with_pre);
  m.impl("linear_backward", &backward);
  m.impl("linear_backward_over_saved", &backward_over_saved);
  m.impl("linear_wide_", &wide_);
}

TORCH_LIBRARY_IMPL(gdbp, CUDA, m) {
  m.impl("linear", &forward);
  m.impl("linear_with_pre", &forward_with_pre);
  m.impl("linear_backward", &backward);
  m.impl("linear_backward_over_saved", &backward_over_saved);
}

}  // namespace gdbp::linear
