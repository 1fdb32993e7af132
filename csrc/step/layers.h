// The layers of a network as a training step runs them: the launchers of their families, over buffers of an Arena.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/activations.h"
#include "common/dtype.h"
#include "step/arena.h"
#include "step/updates.h"

namespace gdbp::step {

inline const void* data_of(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

// What all layers know of the step they are in.
struct Pass {
  Dtype dtype;
  int64_t rows;
  const Arena* arena;
  uint64_t seed;  // of this step's dropout
};

// What a layer works on: its input and output (rows, inputs) and (rows, outputs), and the gradients of both.
// grad_output may be written; grad_input is null where nobody wants it.
struct Slabs {
  const void* input;
  void* output;
  void* grad_output;
  void* grad_input;
};

// Raises an error where a tensor, if there is one, is not what the kernels take.
void check_tensor(const std::string& layer, const at::Tensor& tensor, const char* what, at::IntArrayRef sizes,
                  Dtype dtype);

class Layer {
 public:
  Layer(std::string name, int64_t inputs, int64_t outputs) : name(std::move(name)), inputs(inputs), outputs(outputs) {}
  virtual ~Layer() = default;

  const std::string name;         // as messages name it
  const int64_t inputs, outputs;  // columns; -1 for any, as many out as in
  int64_t width = -1;             // the columns that come out, as planned

  // Its parameters, among those of the network.
  std::vector<int> parameters;
  virtual std::vector<at::Tensor> tensors() const { return {}; }

  // What the backward pass reads, given whether the layer's own parameters are trained.
  virtual bool reads_input(const std::vector<char>& trained) const = 0;
  virtual bool reads_output() const = 0;
  // Whether the gradient of the input may take the place of the output's.
  virtual bool is_elementwise() const { return false; }

  // The length of the sums in its gradients; below 0 where the updates take them from where they are.
  virtual int64_t sum_length(int64_t rows) const { return rows; }

  // Raises an error where its tensors are not what the kernels take, or the input can't be.
  virtual void check(Dtype, int64_t /*rows*/) const {}
  // Buffers of its own. forward, backward: the times of the passes.
  virtual void plan(Dtype, int64_t /*rows*/, Arena&, int /*forward*/, int /*backward*/, int /*end*/) {}
  virtual void forward(const Pass& pass, const Slabs& slabs) = 0;
  virtual void backward(const Pass& pass, const Slabs& slabs, Updates& updates) = 0;
  // Once the step is sure to count.
  virtual void finish(const Pass&) {}

 protected:
  void check_tensor(const at::Tensor& tensor, const char* what, at::IntArrayRef sizes, Dtype dtype) const {
    step::check_tensor(name, tensor, what, sizes, dtype);
  }
  bool is_trained(const std::vector<char>& trained, size_t own) const {
    return own < parameters.size() && parameters[own] >= 0 && trained[parameters[own]];
  }
};

struct LinearOptions {
  std::string name;
  at::Tensor weight, bias;  // bias: undefined for none
  Activation activation;
  // Behind the activation, in a strip alone: the probability, and where among the network's layers it stands.
  double dropout = 0;
  int dropout_index = 0;
};
std::unique_ptr<Layer> make_linear(LinearOptions options);
// Layers that follow one another and are narrow, so that a block of rows stays in the cache on its way through them.
bool fits_strip(const std::vector<LinearOptions>& layers, const LinearOptions& next);
std::unique_ptr<Layer> make_strip(std::vector<LinearOptions> layers);

struct BatchNormOptions {
  double eps;
  std::optional<double> momentum;  // none: the running statistics are the mean of all batches
  bool of_batch;                   // whether the batch's own statistics normalise
  Activation activation;
};
// Each undefined for none. The running statistics normalise, or else are updated.
struct BatchNormTensors {
  at::Tensor weight, bias, running_mean, running_var, batches;
};
std::unique_ptr<Layer> make_batch_norm(std::string name, int64_t channels, BatchNormTensors tensors,
                                       BatchNormOptions options);
std::unique_ptr<Layer> make_activation(std::string name, Activation activation);
// index: among the network's layers, for masks of its own.
std::unique_ptr<Layer> make_dropout(std::string name, double p, int index);

}  // namespace gdbp::step
