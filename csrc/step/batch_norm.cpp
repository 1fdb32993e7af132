// Batch normalisation, with the activation that follows it, as a layer of a training step.
#include "common/binding.h"
#include "norm/norm.h"
#include "step/layers.h"

namespace gdbp::step {
namespace {

class BatchNorm final : public Layer {
 public:
  BatchNorm(std::string name, int64_t channels, BatchNormTensors tensors, BatchNormOptions options)
      : Layer(std::move(name), channels, channels), t_(std::move(tensors)), options_(options) {}

  std::vector<at::Tensor> tensors() const override { return {t_.weight, t_.bias}; }
  bool reads_input(const std::vector<char>&) const override { return true; }
  bool reads_output() const override { return false; }

  void check(Dtype dtype, int64_t rows) const override {
    TORCH_CHECK_VALUE(!options_.of_batch || rows > 1, "Expected more than 1 value per channel when training, got ",
                      rows, " row(s) at ", name, "; pass a larger batch");
    check_tensor(t_.weight, "weight", {outputs}, dtype);
    check_tensor(t_.bias, "bias", {outputs}, dtype);
    check_tensor(t_.running_mean, "running_mean", {outputs}, dtype);
    check_tensor(t_.running_var, "running_var", {outputs}, dtype);
  }

  void plan(Dtype dtype, int64_t rows, Arena& arena, int forward, int backward, int end) override {
    const norm::Shape shape{dtype, rows, outputs, 1};
    stats_ = arena.request(2 * outputs * int64_t(sizeof(double)), forward, end);
    const int64_t bytes = norm::workspace_bytes(shape);
    forward_work_ = arena.request(bytes, forward, forward);
    backward_work_ = arena.request(bytes, backward, backward);
  }

  void forward(const Pass& pass, const Slabs& s) override {
    auto* const stats = static_cast<double*>(pass.arena->at(stats_));
    if (!options_.of_batch) {
      read(t_.running_mean, stats);
      read(t_.running_var, stats + outputs);
    } else if (pass.rows == 0) {
      std::fill(stats, stats + 2 * outputs, 0.0);
    }
    norm::forward_cpu({shape(pass), options_.activation, options_.eps, options_.of_batch, s.input, data_of(t_.weight),
                       data_of(t_.bias), stats, s.output, pass.arena->at(forward_work_)},
                      nullptr);
  }

  void backward(const Pass& pass, const Slabs& s, Updates& updates) override {
    void* const grad_weight = updates.place(parameters[0]);
    void* const grad_bias = updates.place(parameters[1]);
    norm::backward_cpu({shape(pass), options_.activation, options_.eps, options_.of_batch, s.grad_output, s.input,
                        data_of(t_.weight), data_of(t_.bias), static_cast<const double*>(pass.arena->at(stats_)),
                        s.grad_input, grad_weight, grad_bias, pass.arena->at(backward_work_)},
                       nullptr);
    updates.done(parameters[0]);
    updates.done(parameters[1]);
  }

  void finish(const Pass& pass) override {
    if (!options_.of_batch || !t_.running_mean.defined()) return;
    norm::update_cpu(
        {pass.dtype, outputs, double(pass.rows), options_.momentum.value_or(0), !options_.momentum,
         static_cast<const double*>(pass.arena->at(stats_)), nullptr, t_.running_mean.mutable_data_ptr(),
         t_.running_var.mutable_data_ptr(), t_.batches.defined() ? t_.batches.mutable_data_ptr<int64_t>() : nullptr},
        nullptr);
    for (const at::Tensor& t : {t_.running_mean, t_.running_var, t_.batches})
      if (t.defined()) t.unsafeGetTensorImpl()->bump_version();
  }

 private:
  norm::Shape shape(const Pass& pass) const { return {pass.dtype, pass.rows, outputs, 1}; }
  void read(const at::Tensor& from, double* to) const {
    const bool wide = from.scalar_type() == at::kDouble;
    for (int64_t c = 0; c < outputs; ++c)
      to[c] = wide ? from.const_data_ptr<double>()[c] : double(from.const_data_ptr<float>()[c]);
  }

  const BatchNormTensors t_;
  const BatchNormOptions options_;
  Arena::Id stats_ = Arena::kNone, forward_work_ = Arena::kNone, backward_work_ = Arena::kNone;
};

}  // namespace

std::unique_ptr<Layer> make_batch_norm(std::string name, int64_t channels, BatchNormTensors tensors,
                                       BatchNormOptions options) {
  return std::make_unique<BatchNorm>(std::move(name), channels, std::move(tensors), options);
}

}  // namespace gdbp::step
