#include <array>
#include <tuple>

#include "nodes/node.h"
#include "nodes/nodes.h"

namespace gdbp::nodes {
namespace {

class BceWithLogitsBackward : public Node {
 public:
  BceWithLogitsBackward(std::string reduction, bool at_once)
      : Node("_BceWithLogitsBackward"), reduction_(std::move(reduction)), at_once_(at_once) {}

  Gradients apply(Gradients&& gradients) override {
    const Tensor& grad_output = gradients[0];
    if (!grad_output.defined()) return Gradients(2);
    const bool again = is_differentiated(grad_output), is_done = !again && at_once_ && is_one(grad_output);
    const std::vector<Tensor> saved = unpack([&](size_t i) { return !is_done || i == 4; });
    const Tensor &input = saved[0], &target = saved[1], &ahead = saved[4];
    const OptionalTensor weight = optional(saved[2]), pos_weight = optional(saved[3]);
    if (again)
      return from_reference("bce_with_logits_backward", grad_output, input, target, saved[2], saved[3], reduction_);
    if (is_done) return {handed_over(ahead), Tensor()};
    if (at_once_ && is_plain(grad_output) && is_free(4, ahead)) {
      static const auto op =
          find<void(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                    c10::string_view, Tensor)>("gdbp::bce_with_logits_backward_from_one_");
      call(op, grad_output, input, target, weight, pos_weight, reduction_, ahead);
      return {ahead, Tensor()};
    }
    static const auto op =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                        const OptionalTensor&, c10::string_view, std::array<bool, 2>)>(
            "gdbp::bce_with_logits_backward");
    const std::array<bool, 2> mask{task_should_compute_output(0), task_should_compute_output(1)};
    auto [for_input, for_target] = call(op, grad_output, input, target, weight, pos_weight, reduction_, mask);
    return {std::move(for_input), std::move(for_target)};
  }

 private:
  std::vector<std::string> options() const override { return {reduction_, std::to_string(at_once_)}; }

  const std::string reduction_;
  const bool at_once_;
};

}  // namespace

Tensor bce_with_logits(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                       const OptionalTensor& pos_weight, const std::string& reduction) {
  using WithGradient = std::tuple<Tensor, Tensor>;
  const auto run = [&]<class Results>(const char* name, Results*) {
    static const auto op =
        find<Results(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, c10::string_view)>(
            name);
    return call(op, input, target, weight, pos_weight, reduction);
  };
  const bool differentiated = torch::autograd::compute_requires_grad(input, target);
  const bool at_once = differentiated && takes_gradient_at_once(input, target, reduction);
  Tensor loss, gradient;
  if (at_once)
    std::tie(loss, gradient) = run("gdbp::bce_with_logits_with_gradient", static_cast<WithGradient*>(nullptr));
  else
    loss = run("gdbp::bce_with_logits", static_cast<Tensor*>(nullptr));
  if (!differentiated) return loss;
  const auto node = make_node<BceWithLogitsBackward>(reduction, at_once);
  connect(node, loss, input, target);
  node->save(weight);
  node->save(pos_weight);
  node->save(gradient);
  return loss;
}

}  // namespace gdbp::nodes
