#include "step/device_train.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <pybind11/stl.h>

#include "common/binding.h"
#include "common/python.h"
#include "loss/label_watch.h"
#include "mlp/mlp_math.h"

namespace gdbp::step {

namespace py = pybind11;

namespace {

// There is no such launcher for the CPU.
int no_cpu(const mlp::Train&, void*) { return 0; }

}  // namespace

DeviceTrainPlan::DeviceTrainPlan(const py::list& layers, const py::tuple& objective, Watched watched, bool flattens)
    : watched_(std::move(watched)), flattens_(flattens), device_(at::kCUDA) {
  TORCH_CHECK_VALUE(py::len(layers) <= mlp::kMaxLayers, "it has ", py::len(layers), " layers, and that at most ",
                    mlp::kMaxLayers);
  for (const py::handle& handle : layers) {
    const auto d = handle.cast<py::tuple>();
    const auto kind = d[0].cast<std::string>(), name = d[1].cast<std::string>();
    TORCH_CHECK_VALUE(kind == "linear", name, " is no Linear and no activation behind one");
    const at::Tensor weight = unwrap(d[2]), bias = unwrap(d[3]);
    if (parameters_.empty()) device_ = weight.device();
    mlp::Layer& layer = network_.layers[network_.count++];
    layer.inputs = int(weight.size(1));
    layer.outputs = int(weight.size(0));
    layer.activation = parse_activation(d[4].cast<std::string>(), "TrainStep");
    TORCH_CHECK_VALUE(weight.size(0) > 0 && weight.size(1) > 0 && weight.size(0) <= mlp::kMaxWidth &&
                          weight.size(1) <= mlp::kMaxWidth,
                      name, " has a weight of ", weight.sizes(), ", and that 1 to ", mlp::kMaxWidth,
                      " features in and out");
    for (const at::Tensor& t : {weight, bias}) {
      TORCH_CHECK_VALUE(!t.defined() || (t.device() == device_ && t.is_contiguous() &&
                                         t.scalar_type() == unwrap(layers[0].cast<py::tuple>()[2]).scalar_type()),
                        name, " has a parameter that is not contiguous, or of another dtype or device than the first");
      parameters_.push_back(t);
    }
  }
  const at::ScalarType type = parameters_[0].scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "the parameters are ", type);
  TORCH_CHECK_VALUE(network_.layers[network_.count - 1].activation == Activation::none, "it ends with an activation");
  network_.parameters = dtype_of(parameters_[0], "TrainStep", "a parameter");

  const auto name = objective[0].cast<std::string>();
  mean_ = objective[1].cast<std::string>() == "mean";
  if (name == "mse_loss") {
    objective_ = mlp::Objective::mse;
  } else {
    const bool plain = name == "cross_entropy" && objective[2].is_none() && objective[4].cast<double>() == 0 &&
                       objective[5].cast<double>() == 0 && objective[6].cast<double>() == 0 &&
                       !objective[7].cast<bool>();
    TORCH_CHECK_VALUE(plain, name,
                      " is neither mse_loss nor cross_entropy with no more than ignore_index and reduction");
    objective_ = mlp::Objective::cross_entropy;
    ignore_index_ = objective[3].cast<int64_t>();
  }

  const c10::DeviceGuard guard(device_);
  shared_bytes_ = mlp::shared_bytes();
  // Also with gradients of all parameters.
  for (size_t k = 0; k < parameters_.size(); ++k) gradient_at(k) = 0;
  TORCH_CHECK_VALUE(fits("bfloat16"), "it is too large for the ", shared_bytes_, " bytes of shared memory of ",
                    device_);
  const at::TensorOptions options = at::TensorOptions(device_);
  findings_ = at::zeros({mlp::kMaxBlocks + 1, int64_t(sizeof(mlp::Finding))}, options.dtype(at::kByte));
  decided_ = at::zeros({3}, options.dtype(at::kDouble));
}

bool DeviceTrainPlan::fits(const std::string& factors) const {
  mlp::Network network = network_;
  network.factors = mlp::parse_factors(factors);
  return mlp::fits(network, true, shared_bytes_);
}

bool DeviceTrainPlan::collect(StepPlan& plan, const std::vector<Group>& groups, const py::dict& state, bool keep) {
  if (plan.id() != found_in_) {
    entries_.assign(parameters_.size(), -1);
    for (size_t i = 0; i < plan.size(); ++i)
      for (size_t k = 0; k < parameters_.size(); ++k)
        if (parameters_[k].defined() && plan.param(i).is_same(parameters_[k])) entries_[k] = int(i);
    in_plan_.assign(plan.size(), 0);
    found_in_ = plan.id();
  }
  keep_ = keep;
  trained_.assign(parameters_.size(), 0);
  gradients_ = 0;
  for (size_t k = 0; k < parameters_.size(); ++k) {
    if (entries_[k] >= 0) trained_[k] = in_plan_[entries_[k]] = parameters_[k].requires_grad();
    gradient_at(k) = trained_[k] ? gradients_ : -1;
    // In fours, which are read at once.
    if (trained_[k]) gradients_ += (parameters_[k].numel() + 3) / 4 * 4;
  }
  if (!plan.collect(groups, state, in_plan_)) return false;
  for (size_t k = 0; k < parameters_.size(); ++k)
    if (entries_[k] >= 0) parameters_[k].mutable_grad().reset();
  return true;
}

void DeviceTrainPlan::check(const at::Tensor& x, const at::Tensor& y) const {
  TORCH_CHECK_VALUE(x.device() == device_ && y.device() == device_, "TrainStep: input is on ", x.device(),
                    " and target on ", y.device(), "; expected ", device_, ", as the parameters");
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
                    "TrainStep: input has dtype ", x.scalar_type(),
                    "; expected float32, bfloat16 or float16; convert it with .to()");
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == network_.inputs() && x.size(0) > 0, "TrainStep: input has shape ",
                    x.sizes(), "; expected (rows, ", network_.inputs(), ") and at least one row");
  if (objective_ == mlp::Objective::cross_entropy) {
    TORCH_CHECK_VALUE(y.scalar_type() == at::kLong && y.dim() == 1 && y.size(0) == x.size(0),
                      "TrainStep: target has dtype ", y.scalar_type(), " and shape ", y.sizes(),
                      "; expected int64 labels of shape (", x.size(0), ",)");
  } else {
    TORCH_CHECK_VALUE(
        is_supported(y.scalar_type()) && y.dim() == 2 && y.size(0) == x.size(0) && y.size(1) == network_.outputs(),
        "TrainStep: target has dtype ", y.scalar_type(), " and shape ", y.sizes(), "; expected a floating dtype and (",
        x.size(0), ", ", network_.outputs(), ")");
  }
}

void DeviceTrainPlan::ready(int64_t rows) {
  void* const stream = at::accelerator::getCurrentStream(device_.index()).native_handle();
  rows_ = rows;
  blocks_ = mlp::blocks_for(network_, rows, shared_bytes_);
  const int64_t needed = std::max<int64_t>(blocks_ * gradients_, 1);
  if (stream != stream_ || !partials_.defined() || partials_.numel() < needed)
    // Zeros, as the gaps between parameters are summed as well where all gradients are.
    partials_ = at::zeros({needed}, at::TensorOptions(device_).dtype(at::kFloat));
  stream_ = stream;
}

int64_t& DeviceTrainPlan::gradient_at(size_t parameter) {
  mlp::Layer& layer = network_.layers[parameter / 2];
  return parameter % 2 ? layer.bias_at : layer.weight_at;
}

// Their memory may have moved since the last step.
void DeviceTrainPlan::look_up_parameters() {
  for (int l = 0; l < network_.count; ++l) {
    network_.layers[l].weight = parameters_[2 * l].const_data_ptr();
    const at::Tensor& bias = parameters_[2 * l + 1];
    network_.layers[l].bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  }
}

// Whether every update can sum the gradients itself.
bool DeviceTrainPlan::can_sum(StepPlan& plan) const {
  for (size_t k = 0; k < parameters_.size(); ++k)
    if (trained_[k] && plan.slot(entries_[k]).has_extra()) return false;
  return true;
}

py::tuple DeviceTrainPlan::step(StepPlan& plan, const at::Tensor& input, const at::Tensor& target,
                                const std::string& factors, const std::optional<std::pair<double, bool>>& limit) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const bool labels = objective_ == mlp::Objective::cross_entropy;
  if (labels) loss::LabelWatch::instance().raise_arrived();
  const at::Tensor x = (flattens_ && input.dim() > 2 ? input.flatten(1) : input).contiguous(), y = target.contiguous();
  check(x, y);
  const c10::DeviceGuard guard(device_);
  network_.factors = mlp::parse_factors(factors);
  ready(x.size(0));
  look_up_parameters();
  const at::Tensor loss = at::empty({}, at::TensorOptions(device_).dtype(at::kFloat));
  auto* const findings = reinterpret_cast<mlp::Finding*>(findings_.mutable_data_ptr());
  auto* const decision = reinterpret_cast<mlp::Decision*>(decided_.mutable_data_ptr<double>() + 1);
  static_assert(sizeof(mlp::Decision) == sizeof(optim::Control));
  const mlp::Train args{network_,
                        rows_,
                        dtype_of(x, "TrainStep", "input"),
                        labels ? Dtype::float32 : dtype_of(y, "TrainStep", "target"),
                        x.const_data_ptr(),
                        y.const_data_ptr(),
                        objective_,
                        ignore_index_,
                        mean_,
                        gradients_,
                        partials_.mutable_data_ptr<float>(),
                        findings,
                        reinterpret_cast<unsigned*>(findings + mlp::kMaxBlocks),
                        loss.mutable_data_ptr<float>(),
                        decision,
                        labels ? loss::LabelWatch::instance().place(device_) : nullptr};
  run_on(device_, "TrainStep", no_cpu, GDBP_CUDA_LAUNCHER(mlp::train_cuda), args);
  ++completed_;

  if (!limit && !keep_ && can_sum(plan)) {
    use_parts(plan);
  } else {
    use_sums(plan);
  }
  if (!limit) {
    plan.run(decided_, false);
    return py::make_tuple(wrap(loss), py::none());
  }
  const at::Tensor norm = plan.norm(limit->first, 1, limit->second);
  // The gradients are already those of the mean; a label out of range stops the step here, too.
  norm.select(0, 2).copy_(at::maximum(norm.select(0, 2), decided_.select(0, 2)));
  plan.run(norm, false);
  return py::make_tuple(wrap(loss), wrap(norm.unsqueeze(0)));
}

void DeviceTrainPlan::use_parts(StepPlan& plan) {
  for (size_t k = 0; k < parameters_.size(); ++k) {
    if (!trained_[k]) continue;
    optim::Slot& slot = plan.slot(entries_[k]);
    slot.grad = partials_.const_data_ptr<float>() + gradient_at(k);
    slot.grad_dtype = Dtype::float32;
    slot.parts = int(blocks_);
    slot.part_stride = gradients_;
  }
}

// The gradients in one piece, and where asked for in .grad.
void DeviceTrainPlan::use_sums(StepPlan& plan) {
  sums_ = partials_.narrow(0, 0, blocks_ * gradients_).view({blocks_, gradients_}).sum(0);
  sums_.mul_(decided_.select(0, 1));
  // Their factor is in them now.
  decided_.select(0, 1).fill_(1);
  for (size_t k = 0; k < parameters_.size(); ++k) {
    if (!trained_[k]) continue;
    const int64_t at = gradient_at(k);
    optim::Slot& slot = plan.slot(entries_[k]);
    slot.grad = sums_.const_data_ptr<float>() + at;
    slot.grad_dtype = Dtype::float32;
    if (keep_)
      parameters_[k].mutable_grad() =
          sums_.narrow(0, at, parameters_[k].numel()).view(parameters_[k].sizes()).to(parameters_[k].scalar_type());
  }
}

std::tuple<int64_t, int64_t, int64_t> DeviceTrainPlan::memory() const {
  const int64_t bytes = partials_.defined() ? int64_t(partials_.nbytes()) : 0;
  return {rows_, bytes, bytes};
}

void bind_device_train(py::module_& module) {
  using loss::LabelWatch;
  module.def("hold_labels", [] { LabelWatch::instance().hold(); }, "Keeps back what is found of labels on CUDA.");
  module.def(
      "release_labels",
      []() -> py::object {
        const at::Tensor bad = LabelWatch::instance().release();
        return bad.defined() ? wrap(bad) : py::none();
      },
      "Ends hold_labels(); the last finding, row and label or -1, or None.");
  module.def(
      "follow_labels", [](const py::object& bad) { LabelWatch::instance().follow(unwrap(bad)); },
      "Has such a finding raised when it has arrived.");
  module.def("raise_labels", [] { LabelWatch::instance().raise_arrived(); }, "Raises what has arrived.");
  py::class_<Watched>(module, "Watched", "What a plan was made of.")
      .def(py::init<const py::list&, const py::list&>(), py::arg("values"), py::arg("lengths"))
      .def("unchanged", &Watched::unchanged);
  py::class_<DeviceTrainPlan>(module, "DeviceTrainPlan", "TrainPlan's counterpart for narrow networks on CUDA.")
      .def(py::init([](const py::list& layers, const py::tuple& objective, const py::list& values,
                       const py::list& lengths, bool flattens) {
             return std::make_unique<DeviceTrainPlan>(layers, objective, Watched(values, lengths), flattens);
           }),
           py::arg("layers"), py::arg("objective"), py::arg("values"), py::arg("lengths"), py::arg("flattens"))
      .def("unchanged", &DeviceTrainPlan::unchanged)
      .def("fits", &DeviceTrainPlan::fits, py::arg("factors"))
      .def("collect", &DeviceTrainPlan::collect)
      .def("step",
           [](DeviceTrainPlan& self, StepPlan& plan, const py::object& input, const py::object& target,
              const std::string& factors, const std::optional<std::pair<double, bool>>& limit) {
             return self.step(plan, unwrap(input), unwrap(target), factors, limit);
           })
      .def("completed", &DeviceTrainPlan::completed)
      .def("memory", &DeviceTrainPlan::memory);
}

}  // namespace gdbp::step
