// Operators with the graph behind them, as autograd's Functions in gdbp/ops make it. For plain tensors, and where
// nobody traces, transforms or intercepts: see is_direct there.
#pragma once
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

namespace gdbp::nodes {

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  const std::string& activation);

// A whole network of narrow layers on the CPU, an activation for each; none where its kernels (csrc/mlp/mlp_cpu.cpp)
// don't take it.
std::optional<at::Tensor> mlp(const at::Tensor& input, const std::vector<at::Tensor>& weights,
                              const std::vector<std::optional<at::Tensor>>& biases,
                              const std::vector<std::string>& activations);

// In training the batch's statistics normalise, and move the running ones, if there are any.
at::Tensor batch_norm(const at::Tensor& input, const std::optional<at::Tensor>& offset,
                      const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                      const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var,
                      const std::optional<at::Tensor>& batches, bool training, std::optional<double> momentum,
                      double eps, const std::string& activation);

// The options of cross-entropy, which its backward pass needs again.
struct CrossEntropyOptions {
  std::string reduction;
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
};
// inplace: the gradient is written over the logits.
at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& target, const std::optional<at::Tensor>& second,
                         const std::optional<at::Tensor>& share, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& normalizer, const CrossEntropyOptions& options,
                         bool empty_is_zero, bool inplace);

// Losses of single elements, by the names of csrc/pointwise.
at::Tensor pointwise_loss(const at::Tensor& input, const at::Tensor& target, const std::string& kind, double parameter,
                          const std::string& reduction);

at::Tensor bce_with_logits(const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
                           const std::optional<at::Tensor>& pos_weight, const std::string& reduction);

void bind(pybind11::module_& module);

}  // namespace gdbp::nodes
