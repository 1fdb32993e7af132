#include <array>
#include <tuple>

#include "common/binding.h"
#include "nodes/node.h"
#include "nodes/nodes.h"

namespace gdbp::nodes {
namespace {

class LinearBackward : public Node {
 public:
  LinearBackward(std::string activation, bool has_pre)
      : Node("_LinearBackward"), activation_(std::move(activation)), has_pre_(has_pre) {}

  Gradients apply(Gradients&& gradients) override {
    const Tensor& grad_output = gradients[0];
    if (!grad_output.defined()) return Gradients(3);
    const bool again = is_differentiated(grad_output);
    const std::vector<Tensor> saved = unpack([&](size_t i) { return again || i != 2; });
    const Tensor &input = saved[0], &weight = saved[1], &bias = saved[2], &kept = saved[3];
    if (again) return from_reference("linear_backward", grad_output, input, weight, bias, activation_);
    std::array<bool, 3> mask;
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = task_should_compute_output(i);
    // A pre-activation is nobody else's, and what would take new memory takes its place.
    const bool over_saved = has_pre_ && is_free(3, kept) && is_plain(grad_output);
    auto [for_input, for_weight, for_bias] =
        over_saved ? over(grad_output, input, weight, kept, mask)
                   : beside(grad_output, input, weight, kept.defined() ? kept : grad_output, mask);
    return {std::move(for_input), std::move(for_weight), std::move(for_bias)};
  }

 private:
  using Three = std::tuple<Tensor, Tensor, Tensor>;

  Three beside(const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& saved,
               const std::array<bool, 3>& mask) const {
    static const auto op =
        find<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, c10::string_view, std::array<bool, 3>)>(
            "gdbp::linear_backward");
    return call(op, grad_output, input, weight, saved, activation_, mask);
  }
  Three over(const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& saved,
             const std::array<bool, 3>& mask) const {
    static const auto op =
        find<Three(const Tensor&, const Tensor&, const Tensor&, Tensor, c10::string_view, std::array<bool, 3>)>(
            "gdbp::linear_backward_over_saved");
    return call(op, grad_output, input, weight, saved, activation_, mask);
  }
  std::vector<std::string> options() const override { return {activation_}; }

  const std::string activation_;
  const bool has_pre_;
};

Tensor forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view)>("gdbp::linear");
  return call(op, input, weight, bias, activation);
}

}  // namespace

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const std::string& activation) {
  if (!torch::autograd::compute_requires_grad(input, weight, bias)) return forward(input, weight, bias, activation);
  Tensor output, pre;
  const Saved saves = gdbp::saves(parse_activation(activation, "linear"));
  if (saves == Saved::pre) {
    static const auto op =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view)>(
            "gdbp::linear_with_pre");
    std::tie(output, pre) = call(op, input, weight, bias, activation);
  } else {
    output = forward(input, weight, bias, activation);
  }
  const auto node = make_node<LinearBackward>(activation, saves == Saved::pre);
  connect(node, output, input, weight, bias);
  if (saves == Saved::output)
    node->save(output, true);
  else
    node->save(pre);
  return output;
}

}  // namespace gdbp::nodes
