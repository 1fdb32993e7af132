#include <ATen/ops/zeros_like.h>

#include <array>
#include <tuple>

#include "nodes/node.h"
#include "nodes/nodes.h"

namespace gdbp::nodes {
namespace {

class BatchNormBackward : public Node {
 public:
  BatchNormBackward(bool of_batch, double eps, std::string activation)
      : Node("_BatchNormBackward"), of_batch_(of_batch), eps_(eps), activation_(std::move(activation)) {}

  Gradients apply(Gradients&& gradients) override {
    const Tensor& grad_output = gradients[0];
    if (!grad_output.defined()) return Gradients(4);
    const bool again = is_differentiated(grad_output), reads_bias = again || activation_ != "none";
    const std::vector<Tensor> saved = unpack([&](size_t i) { return reads_bias || i != 3; });
    const Tensor &input = saved[0], &offset = saved[1], &weight = saved[2], &bias = saved[3], &stats = saved[4];
    if (again)
      return from_reference("batch_norm_backward", grad_output, input, offset, weight, bias,
                            of_batch_ ? Tensor() : stats, eps_, activation_);
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, bool, double,
        c10::string_view, std::array<bool, 3>)>("gdbp::batch_norm_backward");
    const bool for_offset = task_should_compute_output(1), for_bias = task_should_compute_output(3);
    const std::array<bool, 3> mask{task_should_compute_output(0), task_should_compute_output(2),
                                   for_bias || (for_offset && !of_batch_)};
    auto [for_input, for_weight, sums] =
        call(op, grad_output, input, optional(weight), optional(bias), stats, of_batch_, eps_, activation_, mask);
    Tensor grad_offset;
    if (for_offset && of_batch_) grad_offset = at::zeros_like(offset);
    if (for_offset && !of_batch_) {
      const Tensor scale = stats.select(0, 1).add(eps_).rsqrt();
      grad_offset = (sums.mul(weight.defined() ? scale.mul(weight) : scale)).to(offset.scalar_type());
    }
    return {std::move(for_input), std::move(grad_offset), std::move(for_weight), for_bias ? sums : Tensor()};
  }

 private:
  std::vector<std::string> options() const override { return {std::to_string(of_batch_), exact(eps_), activation_}; }

  const bool of_batch_;
  const double eps_;
  const std::string activation_;
};

}  // namespace

Tensor batch_norm(const Tensor& input, const OptionalTensor& offset, const OptionalTensor& weight,
                  const OptionalTensor& bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& batches, bool training, std::optional<double> momentum, double eps,
                  const std::string& activation) {
  static const auto op = find<std::tuple<Tensor, Tensor>(
      const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, double, c10::string_view)>("gdbp::batch_norm");
  const OptionalTensor none;
  auto [output, stats] = call(op, input, offset, weight, bias, training ? none : running_mean,
                              training ? none : running_var, eps, activation);
  if (training && running_mean) {
    static const auto update =
        find<void(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                  c10::SymInt, std::optional<double>)>("gdbp::batch_norm_update_");
    const int64_t channels = input.size(1);
    call(update, *running_mean, *running_var, batches, stats, offset, channels ? input.numel() / channels : 0,
         momentum);
  }
  if (!torch::autograd::compute_requires_grad(input, offset, weight, bias)) return output;
  const auto node = make_node<BatchNormBackward>(training, eps, activation);
  connect(node, output, input, offset, weight, bias);
  node->save(stats);
  return output;
}

}  // namespace gdbp::nodes
