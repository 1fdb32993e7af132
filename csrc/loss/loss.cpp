#include "loss/loss.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <array>
#include <vector>

#include "common/binding.h"
#include "loss/label_watch.h"

namespace gdbp::loss {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_rows(const Tensor& t, const char* name, at::ScalarType type, const Tensor& logits, const char* op) {
  at::DimVector rows(logits.sizes());
  rows.erase(rows.begin() + 1);
  TORCH_CHECK(t.scalar_type() == type, op, ": ", name, " has dtype ", t.scalar_type(), "; expected ", type,
              "; convert it with .to()");
  TORCH_CHECK(t.sizes() == rows, op, ": ", name, " has shape ", t.sizes(), "; expected ", at::IntArrayRef(rows),
              ", one for each row of logits");
  TORCH_CHECK(t.device() == logits.device(), op, ": ", name, " is on ", t.device(), " and logits on ", logits.device(),
              "; expected the same device; move one of them with .to()");
}

// The arguments that forward and backward share, checked, and in memory as the launchers want them.
class Problem {
 public:
  Problem(const Tensor& logits, const Tensor& target, const OptionalTensor& second, const OptionalTensor& share,
          const OptionalTensor& weight, c10::string_view reduction, int64_t ignore_index, double label_smoothing,
          double z_loss, double softcap, const char* op) {
    dtype_of(logits, op, "logits");
    TORCH_CHECK(logits.dim() >= 2, op, ": logits has shape ", logits.sizes(), "; expected (rows, classes, ...)");
    TORCH_CHECK(second.has_value() == share.has_value(), op, ": a mixture needs both second and share");
    TORCH_CHECK_VALUE(label_smoothing >= 0 && label_smoothing <= 1, op, ": label_smoothing is ", label_smoothing,
                      "; expected a number from 0 to 1");
    TORCH_CHECK_VALUE(z_loss >= 0 && softcap >= 0, op, ": z_loss is ", z_loss, " and softcap is ", softcap,
                      "; expected numbers of at least 0");
    const bool probabilities = target.is_floating_point();
    if (probabilities) {
      check_same(logits, "logits", target, "target", op);
      TORCH_CHECK(target.sizes() == logits.sizes() && !second, op, ": target has shape ", target.sizes(),
                  " and logits ", logits.sizes(), "; expected probabilities of the same shape, and no second target");
    } else {
      check_rows(target, "target", at::kLong, logits, op);
      if (second) check_rows(*second, "second target", at::kLong, logits, op);
      if (share) check_rows(*share, "share", at::kDouble, logits, op);
    }
    if (weight) {
      check_same(logits, "logits", *weight, "weight", op);
      TORCH_CHECK(weight->dim() == 1 && weight->size(0) == logits.size(1), op, ": weight has shape ", weight->sizes(),
                  "; weight tensor should be defined either for all ", logits.size(1),
                  " classes or no classes; expected (", logits.size(1), ",)");
      weight_ = weight->contiguous();
    }
    // Classes last in memory, as in channels_last or a transposed (N, L, C), are rows in one piece.
    classes_last_ = !logits.is_contiguous() && logits.movedim(1, -1).is_contiguous();
    x = laid_out(logits);
    target_ = probabilities ? laid_out(target) : target.contiguous();
    if (second) second_ = second->contiguous();
    if (share) share_ = share->contiguous();
    const int64_t positions = logits.size(0) * inner_of(logits);
    static const double nothing = 0;
    args = {dtype_of(x, op, "logits"),
            parse_reduction(reduction),
            classes_last_ ? positions : logits.size(0),
            logits.size(1),
            classes_last_ ? 1 : inner_of(logits),
            x.const_data_ptr(),
            probabilities ? nullptr : target_.const_data_ptr<int64_t>(),
            second ? second_.const_data_ptr<int64_t>() : nullptr,
            share ? share_.const_data_ptr<double>() : nullptr,
            !probabilities         ? nullptr
            : target_.numel() == 0 ? &nothing  // which lies nowhere, and is no null
                                   : target_.const_data_ptr(),
            weight ? weight_.const_data_ptr() : nullptr,
            ignore_index,
            label_smoothing,
            z_loss,
            softcap};
  }

  Tensor x;  // the logits
  CrossEntropy args;
  const Tensor& probabilities() const { return target_; }

 private:
  static int64_t inner_of(const Tensor& logits) {
    int64_t inner = 1;
    for (int64_t d = 2; d < logits.dim(); ++d) inner *= logits.size(d);
    return inner;
  }
  Tensor laid_out(const Tensor& t) const {
    return classes_last_ ? t.movedim(1, -1).contiguous().movedim(-1, 1) : t.contiguous();
  }

  bool classes_last_ = false;
  Tensor target_, second_, share_, weight_;
};

// Returns the loss, and what the backward pass needs: row statistics and the divisor of the mean; and, where it is
// asked for, the gradient of the logits at an upstream gradient of 1 (else undefined).
std::tuple<Tensor, Tensor, Tensor, Tensor> compute(const Tensor& logits, const Tensor& target,
                                                   const OptionalTensor& second, const OptionalTensor& share,
                                                   const OptionalTensor& weight, const OptionalTensor& normalizer,
                                                   c10::string_view reduction, int64_t ignore_index,
                                                   double label_smoothing, double z_loss, double softcap,
                                                   bool empty_is_zero, bool with_gradient) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const char* const op = "cross_entropy";
  const Problem problem(logits, target, second, share, weight, reduction, ignore_index, label_smoothing, z_loss,
                        softcap, op);
  if (normalizer) {
    TORCH_CHECK(
        normalizer->scalar_type() == at::kDouble && normalizer->numel() == 1 && normalizer->device() == logits.device(),
        op, ": normalizer is not one float64 number on ", logits.device());
  }
  const Tensor& x = problem.x;
  CrossEntropyForward args;
  static_cast<CrossEntropy&>(args) = problem.args;
  const bool labels = !target.is_floating_point();
  const int64_t rows = args.rows();
  at::DimVector shape(x.sizes());
  shape.erase(shape.begin() + 1);
  const Tensor stats = at::empty({rows, stats_per_row(!labels)}, x.options().dtype(compute_type(x)));
  const Tensor output = empty_loss(x, args.reduction, shape);
  const Tensor divisor = at::empty({}, x.options().dtype(at::kDouble));
  // On the CPU nothing outlives the call, and a tensor costs as much as a few rows.
  static thread_local std::vector<double> host_workspace;
  int64_t host_bad[2];
  Tensor workspace;
  if (x.is_cpu()) {
    host_workspace.resize(2 * rows);
    args.workspace = host_workspace.data();
    args.bad = host_bad;
  } else {
    workspace = at::empty({2 * rows}, x.options().dtype(at::kDouble));
    args.workspace = workspace.mutable_data_ptr<double>();
    if (labels) LabelWatch::instance().raise_arrived();
    args.bad = labels ? LabelWatch::instance().place(x.device()) : nullptr;
  }
  const Tensor grad_logits = with_gradient ? on_huge_pages(at::empty_like(x)) : Tensor();
  if (with_gradient) args.grad_logits = grad_logits.mutable_data_ptr();
  args.stats = stats.mutable_data_ptr();
  args.output = output.mutable_data_ptr();
  args.divisor = divisor.mutable_data_ptr<double>();
  args.normalizer = normalizer ? normalizer->const_data_ptr<double>() : nullptr;
  args.empty_is_zero = empty_is_zero;
  run_on(x.device(), op, cross_entropy_forward_cpu, GDBP_CUDA_LAUNCHER(cross_entropy_forward_cuda), args);
  if (x.is_cpu() && args.bad[0] >= 0)
    TORCH_CHECK_INDEX(false, "Target ", args.bad[1], " is out of bounds: cross_entropy got it for row ", args.bad[0],
                      "; expected a class from 0 to ", x.size(1) - 1, ", or ignore_index = ", ignore_index);
  return {output, stats, divisor, grad_logits};
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target,
                                                 const OptionalTensor& second, const OptionalTensor& share,
                                                 const OptionalTensor& weight, const OptionalTensor& normalizer,
                                                 c10::string_view reduction, int64_t ignore_index,
                                                 double label_smoothing, double z_loss, double softcap,
                                                 bool empty_is_zero) {
  const auto [loss, stats, divisor, _] = compute(logits, target, second, share, weight, normalizer, reduction,
                                                 ignore_index, label_smoothing, z_loss, softcap, empty_is_zero, false);
  return {loss, stats, divisor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_with_gradient(
    const Tensor& logits, const Tensor& target, const OptionalTensor& second, const OptionalTensor& share,
    const OptionalTensor& weight, const OptionalTensor& normalizer, c10::string_view reduction, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, bool empty_is_zero) {
  TORCH_CHECK_VALUE(reduction != "none", "cross_entropy_with_gradient: reduction is 'none'; expected mean or sum");
  return compute(logits, target, second, share, weight, normalizer, reduction, ignore_index, label_smoothing, z_loss,
                 softcap, empty_is_zero, true);
}

CrossEntropyBackward describe_backward(const Problem& problem, const Tensor& grad_output, const Tensor& stats,
                                       const Tensor& divisor, const char* op) {
  CrossEntropyBackward args;
  static_cast<CrossEntropy&>(args) = problem.args;
  check_grad_output(grad_output, problem.x, args.reduction, args.rows(), op);
  TORCH_CHECK(stats.is_contiguous() && stats.numel() == stats_per_row(args.target == nullptr) * args.rows() &&
                  stats.scalar_type() == compute_type(problem.x) && divisor.scalar_type() == at::kDouble,
              op, ": stats and divisor are not those that cross_entropy returned for these logits");
  args.stats = stats.const_data_ptr();
  args.divisor = divisor.const_data_ptr<double>();
  args.grad_output = grad_output.const_data_ptr();
  args.grad_logits = args.grad_probabilities = nullptr;
  return args;
}

// Gradients of logits and probabilities, each only where its mask is set (else undefined).
std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                                    const OptionalTensor& second, const OptionalTensor& share,
                                    const OptionalTensor& weight, const Tensor& stats, const Tensor& divisor,
                                    c10::string_view reduction, int64_t ignore_index, double label_smoothing,
                                    double z_loss, double softcap, std::array<bool, 2> mask) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const char* const op = "cross_entropy_backward";
  const Problem problem(logits, target, second, share, weight, reduction, ignore_index, label_smoothing, z_loss,
                        softcap, op);
  const Tensor g = grad_output.contiguous();
  CrossEntropyBackward args = describe_backward(problem, g, stats, divisor, op);
  // Not args.probabilities: empty ones lie nowhere.
  const bool wants_target = mask[1] && target.is_floating_point();
  const Tensor grad_logits = mask[0] ? on_huge_pages(at::empty_like(problem.x)) : Tensor();
  const Tensor grad_target = wants_target ? on_huge_pages(at::empty_like(problem.probabilities())) : Tensor();
  if (mask[0]) args.grad_logits = grad_logits.mutable_data_ptr();
  if (wants_target) args.grad_probabilities = grad_target.mutable_data_ptr();
  if (mask[0] || wants_target)
    run_on(logits.device(), op, cross_entropy_backward_cpu, GDBP_CUDA_LAUNCHER(cross_entropy_backward_cuda), args);
  return {grad_logits, grad_target};
}

// grad_logits is what cross_entropy_with_gradient returned, and becomes the gradient for grad_output.
void backward_from_one_(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                        const OptionalTensor& second, const OptionalTensor& share, const OptionalTensor& weight,
                        const Tensor& stats, const Tensor& divisor, c10::string_view reduction, int64_t ignore_index,
                        double label_smoothing, double z_loss, double softcap, Tensor grad_logits) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const char* const op = "cross_entropy_backward_from_one_";
  const Problem problem(logits, target, second, share, weight, reduction, ignore_index, label_smoothing, z_loss,
                        softcap, op);
  check_from_one(grad_logits, "grad_logits", problem.x, problem.args.reduction, op);
  const Tensor g = grad_output.contiguous();
  CrossEntropyBackward args = describe_backward(problem, g, stats, divisor, op);
  mark_changed(grad_logits);
  if (g.is_cpu() && g.item<double>() == 1) return;
  args.grad_logits = grad_logits.mutable_data_ptr();
  args.unless_one = true;
  run_on(logits.device(), op, cross_entropy_backward_cpu, GDBP_CUDA_LAUNCHER(cross_entropy_backward_cuda), args);
}

// The gradient of the logits takes their place.
void backward_(const Tensor& grad_output, Tensor logits, const Tensor& target, const OptionalTensor& second,
               const OptionalTensor& share, const OptionalTensor& weight, const Tensor& stats, const Tensor& divisor,
               c10::string_view reduction, int64_t ignore_index, double label_smoothing, double z_loss,
               double softcap) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const char* const op = "cross_entropy_backward_";
  const Problem problem(logits, target, second, share, weight, reduction, ignore_index, label_smoothing, z_loss,
                        softcap, op);
  const Tensor g = grad_output.contiguous();
  CrossEntropyBackward args = describe_backward(problem, g, stats, divisor, op);
  args.grad_logits = problem.x.mutable_data_ptr();
  run_on(logits.device(), op, cross_entropy_backward_cpu, GDBP_CUDA_LAUNCHER(cross_entropy_backward_cuda), args);
  if (problem.x.const_data_ptr() != logits.const_data_ptr()) logits.copy_(problem.x);
  mark_changed(logits);
}

void refuse_many(const c10::OperatorHandle&, c10::DispatchKeySet, std::vector<c10::IValue>*) {
  TORCH_CHECK(false,
              "cross_entropy: inplace_backward=True writes one gradient over the logits, and is_grads_batched asks "
              "for many at once; leave out one of them");
}

}  // namespace

#define GDBP_ARGUMENTS " Tensor target, Tensor? second, Tensor? share, Tensor? weight,"
#define GDBP_OPTIONS " str reduction, int ignore_index, float label_smoothing, float z_loss, float softcap"
TORCH_LIBRARY_FRAGMENT(gdbp, m) {
  const auto tags = std::vector<at::Tag>{at::Tag::pt2_compliant_tag};
  m.def("cross_entropy(Tensor logits," GDBP_ARGUMENTS " Tensor? normalizer," GDBP_OPTIONS
        ", bool empty_is_zero) -> (Tensor loss, Tensor stats, Tensor divisor)",
        tags);
  m.def("cross_entropy_with_gradient(Tensor logits," GDBP_ARGUMENTS " Tensor? normalizer," GDBP_OPTIONS
        ", bool empty_is_zero) -> (Tensor loss, Tensor stats, Tensor divisor, Tensor grad_logits)",
        tags);
  m.def("cross_entropy_backward(Tensor grad_output, Tensor logits," GDBP_ARGUMENTS
        " Tensor stats, Tensor divisor," GDBP_OPTIONS ", bool[2] mask) -> (Tensor grad_logits, Tensor grad_target)",
        tags);
  m.def("cross_entropy_backward_from_one_(Tensor grad_output, Tensor logits," GDBP_ARGUMENTS
        " Tensor stats, Tensor divisor," GDBP_OPTIONS ", Tensor(a!) grad_logits) -> ()",
        tags);
  m.def("cross_entropy_backward_(Tensor grad_output, Tensor(a!) logits," GDBP_ARGUMENTS
        " Tensor stats, Tensor divisor," GDBP_OPTIONS ") -> ()",
        tags);
}

#define GDBP_LOSS_IMPL(key)                                              \
  TORCH_LIBRARY_IMPL(gdbp, key, m) {                                     \
    m.impl("cross_entropy", &cross_entropy);                             \
    m.impl("cross_entropy_backward", &backward);                         \
    m.impl("cross_entropy_backward_", &backward_);                       \
    m.impl("cross_entropy_with_gradient", &cross_entropy_with_gradient); \
    m.impl("cross_entropy_backward_from_one_", &backward_from_one_);     \
  }
GDBP_LOSS_IMPL(CPU)
GDBP_LOSS_IMPL(CUDA)
TORCH_LIBRARY_IMPL(gdbp, Batched, m) {
  m.impl("cross_entropy_backward_", torch::CppFunction::makeFromBoxedFunction<&refuse_many>());
}

}  // namespace gdbp::loss
