#include <array>
#include <tuple>

#include "nodes/node.h"
#include "nodes/nodes.h"

namespace gdbp::nodes {
namespace {

enum class Writes { fresh, inplace, at_once };

class CrossEntropyBackward : public Node {
 public:
  CrossEntropyBackward(CrossEntropyOptions options, Writes writes)
      : Node("_CrossEntropyBackward"), options_(std::move(options)), writes_(writes) {}

  Gradients apply(Gradients&& gradients) override {
    const Tensor& grad_output = gradients[0];
    if (!grad_output.defined()) return Gradients(2);
    const bool again = is_differentiated(grad_output);
    const bool is_done = !again && writes_ == Writes::at_once && is_one(grad_output);
    const std::vector<Tensor> saved = unpack([&](size_t i) { return !is_done || i == 8; });
    const Tensor &logits = saved[0], &target = saved[1], &stats = saved[6], &divisor = saved[7];
    const OptionalTensor second = optional(saved[2]), share = optional(saved[3]), weight = optional(saved[4]);
    const auto& [reduction, ignore_index, smoothing, z_loss, softcap] = options_;
    if (again) {
      TORCH_CHECK(writes_ != Writes::inplace,
                  "cross_entropy: inplace_backward=True writes the gradient over the logits, so it cannot be "
                  "differentiated again; leave out inplace_backward or create_graph");
      return from_reference("cross_entropy_backward", grad_output, logits, target, saved[2], saved[3], saved[4],
                            saved[5], reduction, ignore_index, smoothing, z_loss, softcap);
    }
    if (is_done) return {handed_over(saved[8]), Tensor()};
    if (writes_ == Writes::at_once && is_plain(grad_output) && is_free(8, saved[8])) {
      // Where the device finds a 1 there is nothing to do.
      static const auto op =
          find<void(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                    const OptionalTensor&, const Tensor&, const Tensor&, c10::string_view, int64_t, double, double,
                    double, Tensor)>("gdbp::cross_entropy_backward_from_one_");
      call(op, grad_output, logits, target, second, share, weight, stats, divisor, reduction, ignore_index, smoothing,
           z_loss, softcap, saved[8]);
      return {saved[8], Tensor()};
    }
    if (writes_ == Writes::inplace) {
      static const auto op =
          find<void(const Tensor&, Tensor, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                    const OptionalTensor&, const Tensor&, const Tensor&, c10::string_view, int64_t, double, double,
                    double)>("gdbp::cross_entropy_backward_");
      call(op, grad_output, logits, target, second, share, weight, stats, divisor, reduction, ignore_index, smoothing,
           z_loss, softcap);
      return {logits.detach(), Tensor()};
    }
    static const auto op =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                        const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                        c10::string_view, int64_t, double, double, double, std::array<bool, 2>)>(
            "gdbp::cross_entropy_backward");
    const std::array<bool, 2> mask{task_should_compute_output(0), task_should_compute_output(1)};
    auto [for_logits, for_target] = call(op, grad_output, logits, target, second, share, weight, stats, divisor,
                                         reduction, ignore_index, smoothing, z_loss, softcap, mask);
    return {std::move(for_logits), std::move(for_target)};
  }

 private:
  std::vector<std::string> options() const override {
    const auto& [reduction, ignore_index, smoothing, z_loss, softcap] = options_;
    return {reduction,     std::to_string(int(writes_)), std::to_string(ignore_index), exact(smoothing), exact(z_loss),
            exact(softcap)};
  }

  const CrossEntropyOptions options_;
  const Writes writes_;
};

}  // namespace

Tensor cross_entropy(const Tensor& logits, const Tensor& target, const OptionalTensor& second,
                     const OptionalTensor& share, const OptionalTensor& weight, const OptionalTensor& normalizer,
                     const CrossEntropyOptions& options, bool empty_is_zero, bool inplace) {
  using Statistics = std::tuple<Tensor, Tensor, Tensor>;
  using WithGradient = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  const auto run = [&]<class Results>(const char* name, Results*) {
    static const auto op =
        find<Results(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                     const OptionalTensor&, c10::string_view, int64_t, double, double, double, bool)>(name);
    return call(op, logits, target, second, share, weight, normalizer, options.reduction, options.ignore_index,
                options.label_smoothing, options.z_loss, options.softcap, empty_is_zero);
  };
  if (!torch::autograd::compute_requires_grad(logits, target))
    return std::get<0>(run("gdbp::cross_entropy", static_cast<Statistics*>(nullptr)));
  const bool at_once = !inplace && takes_gradient_at_once(logits, target, options.reduction);
  Tensor loss, stats, divisor, gradient;
  if (at_once)
    std::tie(loss, stats, divisor, gradient) =
        run("gdbp::cross_entropy_with_gradient", static_cast<WithGradient*>(nullptr));
  else
    std::tie(loss, stats, divisor) = run("gdbp::cross_entropy", static_cast<Statistics*>(nullptr));
  const auto node = make_node<CrossEntropyBackward>(options, at_once   ? Writes::at_once
                                                             : inplace ? Writes::inplace
                                                                       : Writes::fresh);
  connect(node, loss, logits, target);
  for (const OptionalTensor& argument : {second, share, weight, normalizer}) node->save(argument);
  node->save(stats);
  node->save(divisor);
  node->save(gradient);
  return loss;
}

}  // namespace gdbp::nodes
