// Narrow linear layers in a row, as one layer of a training step: the launchers of the mlp family.
#include "common/narrow_gemm_cpu.h"
#include "common/random.h"
#include "mlp/mlp.h"
#include "step/layers.h"

namespace gdbp::step {
namespace {

class Strip final : public Layer {
 public:
  explicit Strip(std::vector<LinearOptions> layers)
      : Layer(layers.front().name, layers.front().weight.size(1), layers.back().weight.size(0)),
        layers_(std::move(layers)) {
    for (const LinearOptions& layer : layers_) {
      mlp::Layer& l = network_.layers[network_.count++];
      l.inputs = int(layer.weight.size(1));
      l.outputs = int(layer.weight.size(0));
      l.activation = layer.activation;
    }
  }

  std::vector<at::Tensor> tensors() const override {
    std::vector<at::Tensor> all;
    for (const LinearOptions& layer : layers_) all.insert(all.end(), {layer.weight, layer.bias});
    return all;
  }
  bool reads_input(const std::vector<char>& trained) const override { return is_trained(trained, 0); }
  int64_t sum_length(int64_t) const override { return -1; }
  bool reads_output() const override {
    return saves(layers_.back().activation) == Saved::output && !keeps_apart(network_.count - 1);
  }

  void check(Dtype dtype, int64_t) const override {
    for (int l = 0; l < network_.count; ++l) {
      const LinearOptions& layer = layers_[l];
      const int64_t inputs = network_.layers[l].inputs, outputs = network_.layers[l].outputs;
      step::check_tensor(layer.name, layer.weight, "weight", {outputs, inputs}, dtype);
      step::check_tensor(layer.name, layer.bias, "bias", {outputs}, dtype);
    }
  }

  void plan(Dtype dtype, int64_t rows, Arena& arena, int forward, int backward, int end) override {
    network_.parameters = dtype;
    const auto slab = [&](int l) {
      const int64_t bytes = rows * network_.layers[l].outputs * size_of(dtype);
      return arena.request(bytes + cpu::kVectorBytes, forward, backward);
    };
    for (int l = 0; l < network_.count; ++l) {
      outputs_[l] = l + 1 < network_.count ? slab(l) : Arena::kNone;
      saved_[l] = keeps_apart(l) ? slab(l) : Arena::kNone;
    }
    forward_work_ = arena.request(mlp::forward_bytes(network_, rows), forward, forward);
    backward_work_ = arena.request(mlp::backward_bytes(network_, rows), backward, backward);
    int64_t gradients = 0;
    for (const LinearOptions& l : layers_) gradients += l.weight.numel() + (l.bias.defined() ? l.bias.numel() : 0);
    // The updates may take them at the end.
    gradients_ = arena.request(mlp::groups_for(network_, rows) * gradients * size_of(dtype), backward, end);
  }

  void forward(const Pass& pass, const Slabs& s) override {
    // A parameter may have been given another storage.
    for (int l = 0; l < network_.count; ++l) {
      network_.layers[l].weight = data_of(layers_[l].weight);
      network_.layers[l].bias = data_of(layers_[l].bias);
    }
    mlp::forward_cpu({network_, pass.rows, s.input, kept(pass, s), pass.arena->at(forward_work_), dropouts(pass)},
                     nullptr);
  }

  void backward(const Pass& pass, const Slabs& s, Updates& updates) override {
    int64_t at = 0;
    const auto place = [&](int parameter, const at::Tensor& tensor) {
      const bool wanted = parameter >= 0 && updates.trained()[parameter];
      const int64_t begin = wanted ? at : -1;
      if (wanted) at += tensor.numel();
      return begin;
    };
    for (int l = 0; l < network_.count; ++l) {
      network_.layers[l].weight_at = place(parameters[2 * l], layers_[l].weight);
      network_.layers[l].bias_at = place(parameters[2 * l + 1], layers_[l].bias);
    }
    const mlp::Backward args{network_,
                             pass.rows,
                             s.input,
                             kept(pass, s),
                             s.grad_output,
                             s.grad_input,
                             at,
                             pass.arena->at(gradients_),
                             pass.arena->at(backward_work_),
                             dropouts(pass)};
    mlp::backward_cpu(args, nullptr);
    auto* const gradients = static_cast<char*>(args.partials);
    const auto take = [&](int parameter, int64_t begin) {
      if (begin >= 0) updates.take(parameter, gradients + begin * size_of(pass.dtype));
    };
    for (int l = network_.count - 1; l >= 0; --l) {
      take(parameters[2 * l], network_.layers[l].weight_at);
      take(parameters[2 * l + 1], network_.layers[l].bias_at);
    }
  }

 private:
  bool keeps_apart(int l) const { return mlp::keeps_apart(network_.layers[l], {layers_[l].dropout}); }

  mlp::Dropouts dropouts(const Pass& pass) const {
    mlp::Dropouts all;
    for (int l = 0; l < network_.count; ++l)
      all[l] = {layers_[l].dropout, combine_seed(pass.seed, uint64_t(layers_[l].dropout_index))};
    return all;
  }

  mlp::Kept kept(const Pass& pass, const Slabs& s) const {
    mlp::Kept kept{};
    for (int l = 0; l < network_.count; ++l) {
      kept.outputs[l] = l + 1 < network_.count ? pass.arena->at(outputs_[l]) : s.output;
      kept.saved[l] = pass.arena->at(saved_[l]);
    }
    return kept;
  }

  const std::vector<LinearOptions> layers_;
  mlp::Network network_{};
  Arena::Id outputs_[mlp::kMaxLayers], saved_[mlp::kMaxLayers];
  Arena::Id forward_work_ = Arena::kNone, backward_work_ = Arena::kNone, gradients_ = Arena::kNone;
};

}  // namespace

bool fits_strip(const std::vector<LinearOptions>& layers, const LinearOptions& next) {
  const int64_t inputs = next.weight.size(1), outputs = next.weight.size(0);
  if (inputs < 1 || outputs < 1 || inputs > mlp::kMaxWidth || outputs > mlp::kMaxWidth) return false;
  return layers.empty() || (layers.size() < size_t(mlp::kMaxLayers) && layers.back().weight.size(0) == inputs);
}

std::unique_ptr<Layer> make_strip(std::vector<LinearOptions> layers) {
  return std::make_unique<Strip>(std::move(layers));
}

}  // namespace gdbp::step
