#include "step/network.h"

#include "common/binding.h"

namespace gdbp::step {

Network::Network(std::vector<std::unique_ptr<Layer>> layers, std::unique_ptr<Objective> objective)
    : layers_(std::move(layers)), objective_(std::move(objective)) {
  for (const auto& layer : layers_)
    for (const at::Tensor& tensor : layer->tensors()) layer->parameters.push_back(updates.add(tensor));
}

bool Network::is_planned_for(Dtype dtype, int64_t rows, int64_t cols) const {
  return arena_.size() > 0 && output_.dtype == dtype && rows_ == rows && cols_ == cols;
}

void Network::check() const {
  for (const auto& layer : layers_) layer->check(output_.dtype, rows_);
}

// The forward pass of layer i is at time i, the loss at n, the backward pass of layer i at 2n - i. An output lives
// until the last pass that reads it, a gradient from the layer above to its own.
void Network::plan(Dtype dtype, int64_t rows, int64_t cols, int output_dims) {
  const int n = int(layers_.size());
  const std::vector<char>& trained = updates.trained();
  int64_t width = cols;
  for (const auto& layer : layers_) {
    TORCH_CHECK_VALUE(layer->inputs < 0 || layer->inputs == width, "TrainStep: ", layer->name, " gets ", width,
                      " features; expected ", layer->inputs, "; change the layer, or the input");
    width = layer->width = layer->outputs < 0 ? width : layer->outputs;
  }
  arena_.clear();
  rows_ = rows;
  cols_ = cols;
  output_ = {dtype, rows, width, output_dims == 1 ? at::DimVector({rows * width}) : at::DimVector({rows, width})};
  const auto is_trained = [&](const Layer& layer) {
    for (const int parameter : layer.parameters)
      if (parameter >= 0 && trained[parameter]) return true;
    return false;
  };
  first_trained_ = 0;
  while (int(first_trained_) < n && !is_trained(*layers_[first_trained_])) ++first_trained_;

  const auto bytes = [&](int i) { return rows * layers_[i]->width * size_of(dtype); };
  const auto backward_time = [&](int i) { return 2 * n - i; };
  outputs_.assign(n, Arena::kNone);
  gradients_.assign(n, Arena::kNone);
  for (int i = 0; i < n; ++i) {
    // The next layer, or the loss, reads it at least going forward.
    int last = i + 1;
    if (i >= int(first_trained_) && layers_[i]->reads_output()) last = backward_time(i);
    if (i + 1 < n && i + 1 >= int(first_trained_) && layers_[i + 1]->reads_input(trained))
      last = std::max(last, backward_time(i + 1));
    outputs_[i] = arena_.request(bytes(i), i, last);
    layers_[i]->plan(dtype, rows, arena_, i, i >= int(first_trained_) ? backward_time(i) : i, 2 * n + 1);
  }
  for (int i = n - 1; i >= int(first_trained_); --i) {
    if (i == n - 1 && !layers_[i]->reads_output()) {
      // The loss leaves its gradient over its input.
      gradients_[i] = outputs_[i];
      arena_.extend(gradients_[i], backward_time(i));
    } else if (i < n - 1 && layers_[i + 1]->is_elementwise()) {
      gradients_[i] = gradients_[i + 1];
      arena_.extend(gradients_[i], backward_time(i));
    } else {
      gradients_[i] = arena_.request(bytes(i), backward_time(i + 1), backward_time(i));
    }
    for (const int parameter : layers_[i]->parameters)
      updates.plan(parameter, layers_[i]->sum_length(rows), arena_, backward_time(i), 2 * n + 1);
  }
  objective_->plan(output_, arena_, n);
  arena_.lay_out();
}

Slabs Network::slabs(size_t i, const void* input) const {
  return {i == 0 ? input : arena_.at(outputs_[i - 1]), arena_.at(outputs_[i]), arena_.at(gradients_[i]),
          i > first_trained_ ? arena_.at(gradients_[i - 1]) : nullptr};
}

void Network::run(const void* input, const Target& target, uint64_t seed, void* value) {
  seed_ = seed;
  const Pass pass{output_.dtype, rows_, &arena_, seed};
  const size_t n = layers_.size();
  for (size_t i = 0; i < n; ++i) layers_[i]->forward(pass, slabs(i, input));
  const bool backward = first_trained_ < n;
  objective_->run(output_, arena_.at(outputs_[n - 1]), target, arena_, value,
                  backward ? arena_.at(gradients_[n - 1]) : nullptr);
  updates.begin(arena_);
  for (size_t i = n; i-- > first_trained_;) layers_[i]->backward(pass, slabs(i, input), updates);
}

void Network::finish() {
  const Pass pass{output_.dtype, rows_, &arena_, seed_};
  for (const auto& layer : layers_) layer->finish(pass);
}

}  // namespace gdbp::step
