#include <array>
#include <tuple>

#include "nodes/node.h"
#include "nodes/nodes.h"

namespace gdbp::nodes {
namespace {

struct Options {
  std::string kind;
  double parameter;
  std::string reduction;
};

class PointwiseLossBackward : public Node {
 public:
  PointwiseLossBackward(Options options, bool at_once)
      : Node("_PointwiseLossBackward"), options_(std::move(options)), at_once_(at_once) {}

  Gradients apply(Gradients&& gradients) override {
    const Tensor& grad_output = gradients[0];
    if (!grad_output.defined()) return Gradients(2);
    const bool again = is_differentiated(grad_output), is_done = !again && at_once_ && is_one(grad_output);
    const std::vector<Tensor> saved = unpack([&](size_t i) { return !is_done || i == 2; });
    const Tensor &input = saved[0], &target = saved[1], &ahead = saved[2];
    const auto& [kind, parameter, reduction] = options_;
    if (again) return from_reference("pointwise_loss_backward", grad_output, input, target, kind, parameter, reduction);
    if (is_done) return {handed_over(ahead), Tensor()};
    if (at_once_ && is_plain(grad_output) && is_free(2, ahead)) {
      static const auto op =
          find<void(const Tensor&, const Tensor&, const Tensor&, c10::string_view, double, c10::string_view, Tensor)>(
              "gdbp::pointwise_loss_backward_from_one_");
      call(op, grad_output, input, target, kind, parameter, reduction, ahead);
      return {ahead, Tensor()};
    }
    static const auto op =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, c10::string_view, double,
                                        c10::string_view, std::array<bool, 2>)>("gdbp::pointwise_loss_backward");
    const std::array<bool, 2> mask{task_should_compute_output(0), task_should_compute_output(1)};
    auto [for_input, for_target] = call(op, grad_output, input, target, kind, parameter, reduction, mask);
    return {std::move(for_input), std::move(for_target)};
  }

 private:
  std::vector<std::string> options() const override {
    return {options_.kind, exact(options_.parameter), options_.reduction, std::to_string(at_once_)};
  }

  const Options options_;
  const bool at_once_;
};

}  // namespace

Tensor pointwise_loss(const Tensor& input, const Tensor& target, const std::string& kind, double parameter,
                      const std::string& reduction) {
  using WithGradient = std::tuple<Tensor, Tensor>;
  const auto run = [&]<class Results>(const char* name, Results*) {
    static const auto op =
        find<Results(const Tensor&, const Tensor&, c10::string_view, double, c10::string_view)>(name);
    return call(op, input, target, kind, parameter, reduction);
  };
  const bool differentiated = torch::autograd::compute_requires_grad(input, target);
  const bool at_once = differentiated && takes_gradient_at_once(input, target, reduction);
  Tensor loss, gradient;
  if (at_once)
    std::tie(loss, gradient) = run("gdbp::pointwise_loss_with_gradient", static_cast<WithGradient*>(nullptr));
  else
    loss = run("gdbp::pointwise_loss", static_cast<Tensor*>(nullptr));
  if (!differentiated) return loss;
  const auto node = make_node<PointwiseLossBackward>(Options{kind, parameter, reduction}, at_once);
  connect(node, loss, input, target);
  node->save(gradient);
  return loss;
}

}  // namespace gdbp::nodes
