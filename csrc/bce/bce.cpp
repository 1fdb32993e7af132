#include "bce/bce.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <array>

#include "common/binding.h"

namespace gdbp::bce {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The arguments that forward and backward share, checked, and in memory as the launchers want them.
struct Problem {
  Tensor x, t, weight, pos_weight;
  Loss loss;

  Problem(const Tensor& input, const Tensor& target, const OptionalTensor& w, const OptionalTensor& q,
          c10::string_view reduction, const char* op)
      : x(input.contiguous()), t(target.contiguous()) {
    check_same(input, "input", target, "target", op);
    TORCH_CHECK(input.sizes() == target.sizes(), op, ": target has shape ", target.sizes(), " and input ",
                input.sizes(), "; expected the same shape");
    loss = {parse_reduction(reduction),
            dtype_of(x, op, "input"),
            x.numel(),
            x.const_data_ptr(),
            t.const_data_ptr(),
            factors(w, weight, "weight", op),
            factors(q, pos_weight, "pos_weight", op)};
  }

 private:
  // Those of the last dimensions repeat and stay as they are; any others are spread over all elements.
  Factors factors(const OptionalTensor& given, Tensor& kept, const char* name, const char* op) const {
    if (!given || x.numel() == 0) return {nullptr, 1};
    check_same(x, "input", *given, name, op);
    at::IntArrayRef sizes = given->sizes();
    while (!sizes.empty() && sizes.front() == 1) sizes = sizes.slice(1);
    const int64_t dims = int64_t(sizes.size());
    const bool repeats = dims <= x.dim() && sizes == x.sizes().slice(x.dim() - dims);
    kept = repeats ? given->contiguous() : given->expand(x.sizes()).contiguous();
    return {kept.const_data_ptr(), kept.numel()};
  }
};

// The loss and, where it is asked for, the gradient of the input at an upstream gradient of 1 (else undefined).
std::tuple<Tensor, Tensor> compute(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                   const OptionalTensor& pos_weight, c10::string_view reduction, bool with_gradient) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const char* const op = "binary_cross_entropy_with_logits";
  const Problem problem(input, target, weight, pos_weight, reduction, op);
  const Tensor output = empty_loss(problem.x, problem.loss.reduction, input.sizes());
  const Tensor workspace = at::empty({tiles(problem.loss.numel, kTile)}, problem.x.options().dtype(at::kDouble));
  const Tensor grad_input = with_gradient ? on_huge_pages(at::empty_like(problem.x)) : Tensor();
  const Forward args{problem.loss, output.mutable_data_ptr(), workspace.mutable_data_ptr(),
                     with_gradient ? grad_input.mutable_data_ptr() : nullptr};
  run_on(input.device(), op, forward_cpu, GDBP_CUDA_LAUNCHER(forward_cuda), args);
  return {output, grad_input};
}

Tensor forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
               const OptionalTensor& pos_weight, c10::string_view reduction) {
  return std::get<0>(compute(input, target, weight, pos_weight, reduction, false));
}

std::tuple<Tensor, Tensor> forward_with_gradient(const Tensor& input, const Tensor& target,
                                                 const OptionalTensor& weight, const OptionalTensor& pos_weight,
                                                 c10::string_view reduction) {
  TORCH_CHECK_VALUE(reduction != "none", "bce_with_logits_with_gradient: reduction is 'none'; expected mean or sum");
  return compute(input, target, weight, pos_weight, reduction, true);
}

// Gradients of input and target, each only where its mask is set (else undefined).
std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                    const OptionalTensor& weight, const OptionalTensor& pos_weight,
                                    c10::string_view reduction, std::array<bool, 2> mask) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const char* const op = "binary_cross_entropy_with_logits_backward";
  const Problem problem(input, target, weight, pos_weight, reduction, op);
  const Tensor g = grad_output.contiguous();
  check_grad_output(g, problem.x, problem.loss.reduction, problem.loss.numel, op);
  const Tensor grad_input = mask[0] ? on_huge_pages(at::empty_like(problem.x)) : Tensor();
  const Tensor grad_target = mask[1] ? on_huge_pages(at::empty_like(problem.x)) : Tensor();
  const Backward args{problem.loss, g.const_data_ptr(), mask[0] ? grad_input.mutable_data_ptr() : nullptr,
                      mask[1] ? grad_target.mutable_data_ptr() : nullptr};
  run_on(input.device(), op, backward_cpu, GDBP_CUDA_LAUNCHER(backward_cuda), args);
  return {grad_input, grad_target};
}

// grad_input is what forward_with_gradient returned, and becomes the gradient for grad_output.
void backward_from_one_(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                        const OptionalTensor& weight, const OptionalTensor& pos_weight, c10::string_view reduction,
                        Tensor grad_input) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const char* const op = "binary_cross_entropy_with_logits_backward_from_one_";
  const Problem problem(input, target, weight, pos_weight, reduction, op);
  const Tensor g = grad_output.contiguous();
  check_from_one(grad_input, "grad_input", problem.x, problem.loss.reduction, op);
  check_grad_output(g, problem.x, problem.loss.reduction, problem.loss.numel, op);
  mark_changed(grad_input);
  if (g.is_cpu() && g.item<double>() == 1) return;
  const Backward args{problem.loss, g.const_data_ptr(), grad_input.mutable_data_ptr(), nullptr, true};
  run_on(input.device(), op, backward_cpu, GDBP_CUDA_LAUNCHER(backward_cuda), args);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdbp, m) {
  m.def("bce_with_logits(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, str reduction) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "bce_with_logits_with_gradient(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, str reduction)"
      " -> (Tensor loss, Tensor grad_input)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "bce_with_logits_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight,"
      " str reduction, bool[2] mask) -> (Tensor grad_input, Tensor grad_target)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "bce_with_logits_backward_from_one_(Tensor grad_output, Tensor input, Tensor target, Tensor? weight,"
      " Tensor? pos_weight, str reduction, Tensor(a!) grad_input) -> ()",
      {at::Tag::pt2_compliant_tag});
}

#define GDBP_BCE_IMPL(key)                                             \
  TORCH_LIBRARY_IMPL(gdbp, key, m) {                                   \
    m.impl("bce_with_logits", &forward);                               \
    m.impl("bce_with_logits_with_gradient", &forward_with_gradient);   \
    m.impl("bce_with_logits_backward", &backward);                     \
    m.impl("bce_with_logits_backward_from_one_", &backward_from_one_); \
  }
GDBP_BCE_IMPL(CPU)
GDBP_BCE_IMPL(CUDA)

}  // namespace gdbp::bce
