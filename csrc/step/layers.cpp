#include "step/layers.h"

#include "common/binding.h"
#include "common/gemm.h"
#include "dropout/dropout.h"
#include "linear/linear.h"
#include "step/elementwise.h"

namespace gdbp::step {
namespace {

class Linear final : public Layer {
 public:
  explicit Linear(LinearOptions options)
      : Layer(std::move(options.name), options.weight.size(1), options.weight.size(0)),
        weight_(std::move(options.weight)),
        bias_(std::move(options.bias)),
        activation_(options.activation) {}

  std::vector<at::Tensor> tensors() const override { return {weight_, bias_}; }
  bool reads_input(const std::vector<char>& trained) const override { return is_trained(trained, 0); }
  bool reads_output() const override { return saves(activation_) == Saved::output; }

  void check(Dtype dtype, int64_t) const override {
    check_tensor(weight_, "weight", {outputs, inputs}, dtype);
    check_tensor(bias_, "bias", {outputs}, dtype);
  }

  void plan(Dtype dtype, int64_t rows, Arena& arena, int forward, int backward, int) override {
    const bool keeps_pre = saves(activation_) == Saved::pre;
    pre_ = keeps_pre ? arena.request(rows * outputs * size_of(dtype), forward, backward) : Arena::kNone;
    sums_ = arena.request(linear::workspace_bytes(dtype, rows, outputs), backward, backward);
  }

  void forward(const Pass& pass, const Slabs& s) override {
    void* const pre = pre_ == Arena::kNone ? s.output : pass.arena->at(pre_);
    const bool finished = !bias_.defined() && activation_ == Activation::none;
    // Bias and activation while the piece is in cache.
    const auto finish = [&](int64_t begin, int64_t end) {
      const int64_t offset = begin * outputs * size_of(pass.dtype);
      if (!finished)
        linear::forward_cpu({pass.dtype, activation_, end - begin, outputs, static_cast<char*>(pre) + offset,
                             data_of(bias_), static_cast<char*>(s.output) + offset},
                            nullptr);
    };
    parallel_gemm(pass.dtype, pass.rows, outputs, inputs, {s.input, inputs}, {weight_.const_data_ptr(), inputs, true},
                  pre, outputs, finish);
  }

  void backward(const Pass& pass, const Slabs& s, Updates& updates) override {
    const int weight = parameters[0], bias = parameters[1];
    void* const grad_bias = updates.place(bias);
    if (activation_ != Activation::none || grad_bias) {
      const void* const saved = reads_output() ? s.output : pass.arena->at(pre_);
      linear::backward_cpu({pass.dtype, activation_, pass.rows, outputs, s.grad_output, saved,
                            activation_ == Activation::none ? nullptr : s.grad_output, grad_bias,
                            grad_bias ? pass.arena->at(sums_) : nullptr},
                           nullptr);
    }
    // Before the update: this is the gradient through the weights that were used.
    if (s.grad_input)
      parallel_gemm(pass.dtype, pass.rows, inputs, outputs, {s.grad_output, outputs},
                    {weight_.const_data_ptr(), inputs}, s.grad_input, inputs, [](int64_t, int64_t) {});
    const Operand grad_pre{s.grad_output, outputs, true}, input{s.input, inputs};
    updates.matrix(weight, [&](int64_t begin, int64_t end, void* out) {
      gemm(pass.dtype, end - begin, inputs, pass.rows, grad_pre.from_row(begin, pass.dtype), input, out, inputs);
    });
    updates.done(bias);
  }

 private:
  const at::Tensor weight_, bias_;
  const Activation activation_;
  Arena::Id pre_ = Arena::kNone, sums_ = Arena::kNone;
};

// An activation that follows no layer with arithmetic of its own.
class LoneActivation final : public Layer {
 public:
  LoneActivation(std::string name, Activation activation) : Layer(std::move(name), -1, -1), activation_(activation) {}

  bool reads_input(const std::vector<char>&) const override { return saves(activation_) == Saved::pre; }
  bool reads_output() const override { return saves(activation_) == Saved::output; }
  bool is_elementwise() const override { return true; }

  void forward(const Pass& pass, const Slabs& s) override {
    activation_forward_cpu(pass.dtype, activation_, pass.rows * width, s.input, s.output);
  }
  void backward(const Pass& pass, const Slabs& s, Updates&) override {
    activation_backward_cpu(pass.dtype, activation_, pass.rows * width, reads_output() ? s.output : s.input,
                            s.grad_output);
  }

 private:
  const Activation activation_;
};

// The mask is computed again in the backward pass, from the seed of the step.
class Dropout final : public Layer {
 public:
  Dropout(std::string name, double p, int index) : Layer(std::move(name), -1, -1), p_(p), index_(index) {}

  bool reads_input(const std::vector<char>&) const override { return false; }
  bool reads_output() const override { return false; }
  bool is_elementwise() const override { return true; }

  void forward(const Pass& pass, const Slabs& s) override { apply(pass, s.input, s.output); }
  void backward(const Pass& pass, const Slabs& s, Updates&) override { apply(pass, s.grad_output, s.grad_output); }

 private:
  void apply(const Pass& pass, const void* in, void* out) const {
    dropout::dropout_cpu({pass.dtype, pass.rows * width, p_, &pass.seed, uint64_t(index_), in, out}, nullptr);
  }
  const double p_;
  const int index_;
};

}  // namespace

void check_tensor(const std::string& layer, const at::Tensor& tensor, const char* what, at::IntArrayRef sizes,
                  Dtype dtype) {
  if (!tensor.defined()) return;
  const at::ScalarType type = dtype == Dtype::float64 ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(
      tensor.is_contiguous() && tensor.sizes() == sizes && tensor.is_cpu() && tensor.scalar_type() == type,
      "TrainStep: ", what, " of ", layer, " has shape ", tensor.sizes(), ", strides ", tensor.strides(), " and dtype ",
      tensor.scalar_type(), " on ", tensor.device(), "; expected shape ", sizes, ", contiguous, of the input's dtype ",
      type, " on cpu; convert input or model with .to(), or make it .contiguous()");
}

std::unique_ptr<Layer> make_linear(LinearOptions options) { return std::make_unique<Linear>(std::move(options)); }
std::unique_ptr<Layer> make_activation(std::string name, Activation activation) {
  return std::make_unique<LoneActivation>(std::move(name), activation);
}
std::unique_ptr<Layer> make_dropout(std::string name, double p, int index) {
  return std::make_unique<Dropout>(std::move(name), p, index);
}

}  // namespace gdbp::step
