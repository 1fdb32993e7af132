#include "loss/loss.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "common/binding.h"

namespace gdbp::loss {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_classes(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, double smoothing,
                   const char* op) {
  dtype_of(logits, op, "logits");
  TORCH_CHECK(logits.dim() == 2, op, ": logits has shape ", logits.sizes(), "; expected (rows, classes)");
  TORCH_CHECK(target.scalar_type() == at::kLong, op, ": target has dtype ", target.scalar_type(),
              "; expected int64 class indices; convert it with .long()");
  TORCH_CHECK(target.dim() == 1 && target.size(0) == logits.size(0), op, ": target has shape ", target.sizes(),
              "; expected (", logits.size(0), ",), one class for each row of logits");
  TORCH_CHECK(target.device() == logits.device(), op, ": target is on ", target.device(), " and logits on ",
              logits.device(), "; expected the same device; move one of them with .to()");
  if (weight) {
    check_same(logits, "logits", *weight, "weight", op);
    TORCH_CHECK(weight->dim() == 1 && weight->size(0) == logits.size(1), op, ": weight has shape ", weight->sizes(),
                "; weight tensor should be defined either for all ", logits.size(1),
                " classes or no classes; expected (", logits.size(1), ",)");
  }
  TORCH_CHECK_VALUE(smoothing >= 0 && smoothing <= 1, op, ": label_smoothing is ", smoothing,
                    "; expected a number from 0 to 1");
}

// Returns the loss, and what the backward pass needs: row statistics and the divisor of the mean.
std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target,
                                                 const OptionalTensor& weight, c10::string_view reduction_name,
                                                 int64_t ignore_index, double label_smoothing) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const char* const op = "cross_entropy";
  const Reduction reduction = parse_reduction(reduction_name);
  check_classes(logits, target, weight, label_smoothing, op);
  const Tensor x = logits.contiguous(), y = target.contiguous();
  const Tensor w = weight ? weight->contiguous() : Tensor();
  const int64_t rows = x.size(0);
  const Tensor stats = at::empty({rows, 2}, x.options().dtype(compute_type(x)));
  const Tensor output = empty_loss(x, reduction, {rows});
  const Tensor total_weight = at::empty({}, x.options().dtype(at::kDouble));
  const Tensor workspace = at::empty({2 * rows}, x.options().dtype(at::kDouble));
  const Tensor bad_row = at::empty({}, y.options());
  CrossEntropyForward args;
  static_cast<CrossEntropy&>(args) = {dtype_of(x, op, "logits"),
                                      reduction,
                                      rows,
                                      x.size(1),
                                      x.const_data_ptr(),
                                      static_cast<const int64_t*>(y.const_data_ptr()),
                                      w.defined() ? w.const_data_ptr() : nullptr,
                                      ignore_index,
                                      label_smoothing};
  args.stats = stats.mutable_data_ptr();
  args.output = output.mutable_data_ptr();
  args.total_weight = total_weight.mutable_data_ptr();
  args.bad_row = static_cast<int64_t*>(bad_row.mutable_data_ptr());
  args.workspace = workspace.mutable_data_ptr();
  run_on(x.device(), op, cross_entropy_forward_cpu, GDBP_CUDA_LAUNCHER(cross_entropy_forward_cuda), args);
  // On CUDA a look at bad_row would stop the stream; there a wrong label makes its loss NaN.
  if (x.device().is_cpu() && *args.bad_row >= 0) {
    const int64_t row = *args.bad_row;
    TORCH_CHECK_INDEX(false, "Target ", args.target[row], " is out of bounds: cross_entropy got it for row ", row,
                      "; expected a class from 0 to ", x.size(1) - 1, ", or ignore_index = ", ignore_index);
  }
  return {output, stats, total_weight};
}

Tensor cross_entropy_grad(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                          const OptionalTensor& weight, const Tensor& stats, const Tensor& total_weight,
                          c10::string_view reduction_name, int64_t ignore_index, double label_smoothing) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const char* const op = "cross_entropy_backward";
  const Reduction reduction = parse_reduction(reduction_name);
  check_classes(logits, target, weight, label_smoothing, op);
  check_grad_output(grad_output, logits, reduction, logits.size(0), op);
  TORCH_CHECK(stats.is_contiguous() && stats.numel() == 2 * logits.size(0) &&
                  stats.scalar_type() == compute_type(logits) && total_weight.scalar_type() == at::kDouble,
              op, ": stats and total_weight are not those that cross_entropy returned for these logits");
  const Tensor g = grad_output.contiguous(), x = logits.contiguous(), y = target.contiguous();
  const Tensor w = weight ? weight->contiguous() : Tensor();
  const Tensor grad_logits = at::empty_like(x);
  CrossEntropyBackward args;
  static_cast<CrossEntropy&>(args) = {dtype_of(x, op, "logits"),
                                      reduction,
                                      x.size(0),
                                      x.size(1),
                                      x.const_data_ptr(),
                                      static_cast<const int64_t*>(y.const_data_ptr()),
                                      w.defined() ? w.const_data_ptr() : nullptr,
                                      ignore_index,
                                      label_smoothing};
  args.stats = stats.const_data_ptr();
  args.total_weight = total_weight.const_data_ptr();
  args.grad_output = g.const_data_ptr();
  args.grad_logits = grad_logits.mutable_data_ptr();
  run_on(x.device(), op, cross_entropy_backward_cpu, GDBP_CUDA_LAUNCHER(cross_entropy_backward_cuda), args);
  return grad_logits;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdbp, m) {
  const auto tags = std::vector<at::Tag>{at::Tag::pt2_compliant_tag};
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight, str reduction, int ignore_index,"
      " float label_smoothing) -> (Tensor loss, Tensor stats, Tensor total_weight)",
      tags);
  m.def(
      "cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor stats,"
      " Tensor total_weight, str reduction, int ignore_index, float label_smoothing) -> Tensor",
      tags);
}

#define GDBP_LOSS_IMPL(key)                                \
  TORCH_LIBRARY_IMPL(gdbp, key, m) {                       \
    m.impl("cross_entropy", &cross_entropy);               \
    m.impl("cross_entropy_backward", &cross_entropy_grad); \
  }
GDBP_LOSS_IMPL(CPU)
GDBP_LOSS_IMPL(CUDA)

}  // namespace gdbp::loss
