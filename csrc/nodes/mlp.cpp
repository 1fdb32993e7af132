#include <pybind11/stl.h>

#include "common/binding.h"
#include "mlp/mlp.h"
#include "nodes/node.h"
#include "nodes/nodes.h"

namespace gdbp::nodes {
namespace {

using Biases = c10::List<OptionalTensor>;
using Names = c10::List<std::string>;

class MLPBackward : public Node {
 public:
  explicit MLPBackward(const std::vector<std::string>& activations)
      : Node("_MLPBackward"), activations_(activations), layers_(activations.size()) {}

  Gradients apply(Gradients&& gradients) override {
    const Tensor& grad_output = gradients[0];
    Gradients found(1 + 2 * layers_);
    if (!grad_output.defined()) return found;
    // Input, weights and biases in turn, what the forward pass kept, and where that is needed the output.
    const bool again = is_differentiated(grad_output) || is_batched(grad_output);
    const std::vector<Tensor> saved =
        unpack([&](size_t i) { return again || i % 2 == 1 || i == 0 || i >= found.size(); });
    const Tensor &kept = saved[found.size()], &output = saved.back();
    std::vector<bool> mask;
    for (size_t i = 0; i < found.size(); ++i) mask.push_back(task_should_compute_output(i));
    if (again)
      return from_python("gdbp.ops.mlp", "backward_by_layers", grad_output,
                         std::vector<Tensor>(saved.begin(), saved.end() - 2), activations_, mask);
    std::vector<Tensor> weights;
    for (size_t l = 0; l < layers_; ++l) weights.push_back(saved[1 + 2 * l]);
    c10::List<bool> flags;
    for (const bool asked : mask) flags.push_back(asked);
    static const auto op =
        find<std::vector<Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, at::TensorList,
                                 const Names&, const c10::List<bool>&)>("gdbp::mlp_rows_backward");
    std::vector<Tensor> wanted =
        call(op, grad_output, saved[0], kept, optional(output), weights, Names(activations_), flags);
    for (size_t i = 0, next = 0; i < found.size(); ++i)
      if (mask[i]) found[i] = std::move(wanted[next++]);
    return found;
  }

 private:
  std::vector<std::string> options() const override { return activations_; }

  const std::vector<std::string> activations_;
  const size_t layers_;
};

// Whether the kernels take them; all is said to be plain.
bool fits(const Tensor& input, const std::vector<Tensor>& weights, const std::vector<OptionalTensor>& biases) {
  const auto fits_input = [&](const Tensor& t) {
    return t.is_cpu() && t.scalar_type() == input.scalar_type() && t.is_contiguous();
  };
  if ((input.scalar_type() != at::kFloat && input.scalar_type() != at::kDouble) || !input.is_cpu() ||
      input.dim() == 0 || input.is_neg() || weights.empty() || weights.size() > size_t(mlp::kMaxLayers))
    return false;
  int64_t width = input.sizes().back();
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& w = weights[l];
    if (!fits_input(w) || w.dim() != 2 || w.is_neg() || w.size(1) != width || width < 1 || w.size(0) < 1 ||
        width > mlp::kMaxWidth || w.size(0) > mlp::kMaxWidth)
      return false;
    width = w.size(0);
    if (biases[l] && (!fits_input(*biases[l]) || biases[l]->is_neg() || biases[l]->sizes() != at::IntArrayRef{width}))
      return false;
  }
  return true;
}

}  // namespace

OptionalTensor mlp(const Tensor& input, const std::vector<Tensor>& weights, const std::vector<OptionalTensor>& biases,
                   const std::vector<std::string>& activations) {
  if (!fits(input, weights, biases)) return std::nullopt;
  std::vector<Tensor> inputs{input};
  for (size_t l = 0; l < weights.size(); ++l) {
    inputs.push_back(weights[l]);
    inputs.push_back(biases[l].value_or(Tensor()));
  }
  const bool recorded = torch::autograd::compute_requires_grad(inputs);
  static const auto op =
      find<std::tuple<Tensor, Tensor>(const Tensor&, at::TensorList, const Biases&, const Names&, bool)>(
          "gdbp::mlp_rows");
  Biases list;
  for (const OptionalTensor& bias : biases) list.push_back(bias);
  const auto [output, kept] = call(op, input, weights, list, Names(activations), recorded);
  if (!recorded) return output;
  const auto node = make_node<MLPBackward>(activations);
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  for (const Tensor& tensor : inputs) node->save(tensor);
  torch::autograd::set_history(output, node);
  node->save(kept);
  const bool reads_output = saves(parse_activation(activations.back(), "mlp_rows")) == Saved::output;
  node->save(reads_output ? output : Tensor(), reads_output);
  return output;
}

}  // namespace gdbp::nodes
