#include "norm/norm.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <array>

#include "common/binding.h"

namespace gdbp::norm {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

Shape shape_of(const Tensor& input, const char* op) {
  const Dtype dtype = dtype_of(input, op, "input");
  TORCH_CHECK(input.dim() >= 2, op, ": input has shape ", input.sizes(),
              "; expected (batch, channels) or (batch, channels, length)");
  const int64_t length = c10::multiply_integers(input.sizes().slice(2));
  return {dtype, input.size(0), input.size(1), length};
}

void check_channels(const Optional& values, const char* name, const Tensor& input, const char* op) {
  if (!values) return;
  TORCH_CHECK(values->device() == input.device(), op, ": ", name, " is on ", values->device(), " and input on ",
              input.device(), "; expected the same device; move one of them with .to()");
  TORCH_CHECK(values->dim() == 1 && values->size(0) == input.size(1), op, ": ", name, " has shape ", values->sizes(),
              "; expected (", input.size(1), ",), one value for each channel of input");
  TORCH_CHECK(values->scalar_type() == input.scalar_type() || values->scalar_type() == compute_type(input), op, ": ",
              name, " has dtype ", values->scalar_type(), " and input has ", input.scalar_type(),
              "; expected the same, or Float beside a half type; convert one of them with .to()");
}

// In the compute type: half types are few here, and the kernels need not know which ones were stored.
Tensor widened(const Optional& values, const Tensor& input) {
  return values ? values->to(compute_type(input)).contiguous() : Tensor();
}

const void* pointer(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

Tensor new_workspace(const Shape& shape, const Tensor& input) {
  return at::empty({workspace_bytes(shape)}, input.options().dtype(at::kByte));
}

// With running statistics those normalise, else the batch's own. `offset` would be added to the input of every
// channel: normalised with the batch's mean it changes nothing, so it is only taken into account. Output, and
// (2, channels) in double: mean and variance of the input without the offset.
std::tuple<Tensor, Tensor> forward(const Tensor& input, const Optional& offset, const Optional& weight,
                                   const Optional& bias, const Optional& running_mean, const Optional& running_var,
                                   double eps, c10::string_view activation_name) {
  const char* const op = "batch_norm";
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Activation activation = parse_activation(activation_name, op);
  const Shape shape = shape_of(input, op);
  check_channels(offset, "offset", input, op);
  check_channels(weight, "weight", input, op);
  check_channels(bias, "bias", input, op);
  check_channels(running_mean, "running_mean", input, op);
  check_channels(running_var, "running_var", input, op);
  TORCH_CHECK(running_mean.has_value() == running_var.has_value(),
              "batch_norm: of running_mean and running_var one is None; expected both or neither");
  const Tensor x = input.contiguous(), w = widened(weight, input);
  Tensor b = widened(bias, input);
  const Tensor stats = at::empty({2, shape.channels}, input.options().dtype(at::kDouble));
  if (running_mean) {
    stats.select(0, 0).copy_(*running_mean);
    stats.select(0, 1).copy_(*running_var);
    if (offset) stats.select(0, 0).sub_(*offset);
  } else if (offset) {
    // What is not finite must not vanish: it adds NaN, and anything else 0.
    const Tensor nothing = widened(offset, input).sub(widened(offset, input));
    b = b.defined() ? b.add(nothing) : nothing;
  }
  if (!running_mean && input.numel() == 0) stats.zero_();
  const Tensor output = on_huge_pages(at::empty(input.sizes(), input.options()));
  const Tensor workspace = new_workspace(shape, input);
  const Forward args{shape,
                     activation,
                     eps,
                     !running_mean,
                     x.const_data_ptr(),
                     pointer(w),
                     pointer(b),
                     stats.mutable_data_ptr<double>(),
                     output.mutable_data_ptr(),
                     workspace.mutable_data_ptr()};
  run_on(input.device(), op, forward_cpu, GDBP_CUDA_LAUNCHER(forward_cuda), args);
  return {output, stats};
}

// Gradients of input, weight and bias, each only where its mask is set (else undefined).
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Optional& weight,
                                            const Optional& bias, const Tensor& stats, bool of_batch, double eps,
                                            c10::string_view activation_name, std::array<bool, 3> mask) {
  const char* const op = "batch_norm_backward";
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Activation activation = parse_activation(activation_name, op);
  const Shape shape = shape_of(input, op);
  check_same(input, "input", grad_output, "grad_output", op);
  TORCH_CHECK(grad_output.sizes() == input.sizes(), op, ": grad_output has shape ", grad_output.sizes(), "; expected ",
              input.sizes(), ", the shape of input");
  check_channels(weight, "weight", input, op);
  check_channels(bias, "bias", input, op);
  TORCH_CHECK(stats.scalar_type() == at::kDouble && stats.sizes() == at::IntArrayRef({2, shape.channels}) &&
                  stats.device() == input.device(),
              op, ": stats has dtype ", stats.scalar_type(), ", shape ", stats.sizes(), " and is on ", stats.device(),
              "; expected what batch_norm returned");
  const Tensor g = grad_output.contiguous(), x = input.contiguous(), s = stats.contiguous();
  const Tensor w = widened(weight, input), b = widened(bias, input);
  const auto like_channels = [&](bool wanted) {
    return wanted ? at::empty({shape.channels}, input.options().dtype(compute_type(input))) : Tensor();
  };
  const Tensor grad_input = mask[0] ? on_huge_pages(at::empty(input.sizes(), input.options())) : Tensor();
  const Tensor grad_weight = like_channels(mask[1]), grad_bias = like_channels(mask[2]);
  const Tensor workspace = new_workspace(shape, input);
  const Backward args{shape,
                      activation,
                      eps,
                      of_batch,
                      g.const_data_ptr(),
                      x.const_data_ptr(),
                      pointer(w),
                      pointer(b),
                      s.const_data_ptr<double>(),
                      mask[0] ? grad_input.mutable_data_ptr() : nullptr,
                      mask[1] ? grad_weight.mutable_data_ptr() : nullptr,
                      mask[2] ? grad_bias.mutable_data_ptr() : nullptr,
                      workspace.mutable_data_ptr()};
  run_on(input.device(), op, backward_cpu, GDBP_CUDA_LAUNCHER(backward_cuda), args);
  const auto rounded = [&](const Tensor& grad, const Optional& parameter) {
    return grad.defined() && parameter ? grad.to(parameter->scalar_type()) : grad;
  };
  return {grad_input, rounded(grad_weight, weight), rounded(grad_bias, bias)};
}

// The running statistics after a batch of which batch_norm returned `stats`, each channel of `elements` values.
// Without a momentum they are the mean over all batches so far, which `batches` counts.
void update(const Tensor& running_mean, const Tensor& running_var, const Optional& batches, const Tensor& stats,
            const Optional& offset, int64_t elements, std::optional<double> momentum) {
  const char* const op = "batch_norm_update_";
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Dtype dtype = dtype_of(running_mean, op, "running_mean");
  check_same(running_mean, "running_mean", running_var, "running_var", op);
  const int64_t channels = running_mean.numel();
  TORCH_CHECK(running_mean.dim() == 1 && running_var.sizes() == running_mean.sizes(), op, ": running_mean has shape ",
              running_mean.sizes(), " and running_var ", running_var.sizes(), "; expected one value for each channel");
  TORCH_CHECK(stats.scalar_type() == at::kDouble && stats.sizes() == at::IntArrayRef({2, channels}) &&
                  stats.device() == running_mean.device(),
              op, ": stats has dtype ", stats.scalar_type(), ", shape ", stats.sizes(), " and is on ", stats.device(),
              "; expected what batch_norm returned for ", channels, " channels on ", running_mean.device());
  TORCH_CHECK(!batches || (batches->scalar_type() == at::kLong && batches->numel() == 1 &&
                           batches->device() == running_mean.device()),
              op, ": num_batches_tracked is not what was expected, one int64 on ", running_mean.device());
  TORCH_CHECK(momentum || batches, op, ": momentum is None and there is no num_batches_tracked; expected one of them");
  const Tensor s = stats.contiguous(), mean = running_mean.contiguous(), variance = running_var.contiguous();
  const Tensor shift = offset ? offset->to(running_mean.scalar_type()).contiguous() : Tensor();
  const Update args{dtype,
                    channels,
                    double(elements),
                    momentum.value_or(0),
                    !momentum,
                    s.const_data_ptr<double>(),
                    pointer(shift),
                    mean.mutable_data_ptr(),
                    variance.mutable_data_ptr(),
                    batches ? batches->mutable_data_ptr<int64_t>() : nullptr};
  run_on(running_mean.device(), op, update_cpu, GDBP_CUDA_LAUNCHER(update_cuda), args);
  if (!mean.is_same(running_mean)) running_mean.copy_(mean);
  if (!variance.is_same(running_var)) running_var.copy_(variance);
  mark_changed(running_mean);
  mark_changed(running_var);
  if (batches) mark_changed(*batches);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdbp, m) {
  m.def(
      "batch_norm(Tensor input, Tensor? offset, Tensor? weight, Tensor? bias, Tensor? running_mean, "
      "Tensor? running_var, float eps, str activation) -> (Tensor output, Tensor stats)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor stats, "
      "bool of_batch, float eps, str activation, bool[3] mask)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "batch_norm_update_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, "
      "Tensor stats, Tensor? offset, SymInt elements, float? momentum) -> ()",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(gdbp, CPU, m) {
  m.impl("batch_norm", &forward);
  m.impl("batch_norm_backward", &backward);
  m.impl("batch_norm_update_", &update);
}

TORCH_LIBRARY_IMPL(gdbp, CUDA, m) {
  m.impl("batch_norm", &forward);
  m.impl("batch_norm_backward", &backward);
  m.impl("batch_norm_update_", &update);
}

}  // namespace gdbp::norm
