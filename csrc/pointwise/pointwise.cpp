#include "pointwise/pointwise.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <array>

#include "common/binding.h"

namespace gdbp::pointwise {
namespace {

using at::Tensor;

Kind parse(c10::string_view name) {
  std::string names;
  for (Kind kind : kKinds) {
    const char* const known = kKindNames[int(kind)];
    if (name == known) return kind;
    names += (names.empty() ? "" : ", ") + std::string(known);
  }
  TORCH_CHECK_VALUE(false, "pointwise_loss: kind is '", name, "'; expected one of ", names);
}

Loss describe(const Tensor& input, const Tensor& target, Kind kind, double parameter, c10::string_view reduction,
              const char* op) {
  check_same(input, "input", target, "target", op);
  TORCH_CHECK(input.sizes() == target.sizes(), op, ": target has shape ", target.sizes(), " and input ", input.sizes(),
              "; expected the same shape; broadcast them first");
  const bool used = dispatch(kind, [](auto loss) { return decltype(loss)::uses_parameter; });
  TORCH_CHECK_VALUE(!used || parameter > 0, op, ": parameter is ", parameter, "; expected a number above 0");
  return {kind,
          parameter,
          parse_reduction(reduction),
          dtype_of(input, op, "input"),
          input.numel(),
          input.const_data_ptr(),
          target.const_data_ptr()};
}

// The loss and, where it is asked for, the gradient of the input at an upstream gradient of 1 (else undefined).
std::tuple<Tensor, Tensor> compute(const Tensor& input, const Tensor& target, c10::string_view kind_name,
                                   double parameter, c10::string_view reduction, bool with_gradient) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Kind kind = parse(kind_name);
  const char* const op = kKindNames[int(kind)];
  const Tensor x = input.contiguous(), y = target.contiguous();
  const Loss loss = describe(x, y, kind, parameter, reduction, op);
  const Tensor output = empty_loss(x, loss.reduction, x.sizes());
  const Tensor workspace = at::empty({tiles(x.numel(), kTile)}, x.options().dtype(at::kDouble));
  const Tensor grad_input = with_gradient ? on_huge_pages(at::empty_like(x)) : Tensor();
  const Forward args{loss, output.mutable_data_ptr(), workspace.mutable_data_ptr(),
                     with_gradient ? grad_input.mutable_data_ptr() : nullptr};
  run_on(x.device(), op, forward_cpu, GDBP_CUDA_LAUNCHER(forward_cuda), args);
  return {output, grad_input};
}

Tensor forward(const Tensor& input, const Tensor& target, c10::string_view kind, double parameter,
               c10::string_view reduction) {
  return std::get<0>(compute(input, target, kind, parameter, reduction, false));
}

std::tuple<Tensor, Tensor> forward_with_gradient(const Tensor& input, const Tensor& target, c10::string_view kind,
                                                 double parameter, c10::string_view reduction) {
  TORCH_CHECK_VALUE(reduction != "none", "pointwise_loss_with_gradient: reduction is 'none'; expected mean or sum");
  return compute(input, target, kind, parameter, reduction, true);
}

// Gradients of input and target, each only where its mask is set (else undefined).
std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                    c10::string_view kind_name, double parameter, c10::string_view reduction,
                                    std::array<bool, 2> mask) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Kind kind = parse(kind_name);
  const std::string name = std::string(kKindNames[int(kind)]) + "_backward";
  const Tensor g = grad_output.contiguous(), x = input.contiguous(), y = target.contiguous();
  const Loss loss = describe(x, y, kind, parameter, reduction, name.c_str());
  check_grad_output(g, x, loss.reduction, x.numel(), name.c_str());
  const Tensor grad_input = mask[0] ? on_huge_pages(at::empty_like(x)) : Tensor();
  const Tensor grad_target = mask[1] ? on_huge_pages(at::empty_like(x)) : Tensor();
  const Backward args{loss, g.const_data_ptr(), mask[0] ? grad_input.mutable_data_ptr() : nullptr,
                      mask[1] ? grad_target.mutable_data_ptr() : nullptr};
  run_on(x.device(), name.c_str(), backward_cpu, GDBP_CUDA_LAUNCHER(backward_cuda), args);
  return {grad_input, grad_target};
}

// grad_input is what forward_with_gradient returned, and becomes the gradient for grad_output.
void backward_from_one_(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                        c10::string_view kind_name, double parameter, c10::string_view reduction, Tensor grad_input) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Kind kind = parse(kind_name);
  const std::string name = std::string(kKindNames[int(kind)]) + "_backward_from_one_";
  const Tensor g = grad_output.contiguous(), x = input.contiguous(), y = target.contiguous();
  const Loss loss = describe(x, y, kind, parameter, reduction, name.c_str());
  check_from_one(grad_input, "grad_input", x, loss.reduction, name.c_str());
  check_grad_output(g, x, loss.reduction, x.numel(), name.c_str());
  mark_changed(grad_input);
  if (g.is_cpu() && g.item<double>() == 1) return;
  const Backward args{loss, g.const_data_ptr(), grad_input.mutable_data_ptr(), nullptr, true};
  run_on(x.device(), name.c_str(), backward_cpu, GDBP_CUDA_LAUNCHER(backward_cuda), args);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdbp, m) {
  m.def("pointwise_loss(Tensor input, Tensor target, str kind, float parameter, str reduction) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "pointwise_loss_with_gradient(Tensor input, Tensor target, str kind, float parameter, str reduction)"
      " -> (Tensor loss, Tensor grad_input)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "pointwise_loss_backward(Tensor grad_output, Tensor input, Tensor target, str kind, float parameter,"
      " str reduction, bool[2] mask) -> (Tensor grad_input, Tensor grad_target)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "pointwise_loss_backward_from_one_(Tensor grad_output, Tensor input, Tensor target, str kind, float parameter,"
      " str reduction, Tensor(a!) grad_input) -> ()",
      {at::Tag::pt2_compliant_tag});
}

#define GDBP_POINTWISE_IMPL(key)                                      \
  TORCH_LIBRARY_IMPL(gdbp, key, m) {                                  \
    m.impl("pointwise_loss", &forward);                               \
    m.impl("pointwise_loss_with_gradient", &forward_with_gradient);   \
    m.impl("pointwise_loss_backward", &backward);                     \
    m.impl("pointwise_loss_backward_from_one_", &backward_from_one_); \
  }
GDBP_POINTWISE_IMPL(CPU)
GDBP_POINTWISE_IMPL(CUDA)

}  // namespace gdbp::pointwise
