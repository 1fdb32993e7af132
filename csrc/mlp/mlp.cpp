// The operators behind gdbp.nn.MLP on CUDA.
#include "mlp/mlp.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>

#include "common/binding.h"
#include "mlp/mlp_math.h"

namespace gdbp::mlp {
namespace {

using at::Tensor;

// There are no such launchers for the CPU.
int no_forward_on_cpu(const Infer&, void*) { return 0; }
int no_backward_on_cpu(const Train&, void*) { return 0; }

at::ScalarType scalar_type_of(Factors factors) {
  return factors == Factors::bfloat16 ? at::kBFloat16 : factors == Factors::float16 ? at::kHalf : at::kFloat;
}

// Weights of shape (outputs, inputs), and a bias or None for each.
Network network_of(const at::TensorList& weights, const c10::List<std::optional<Tensor>>& biases, Activation activation,
                   c10::string_view factors) {
  TORCH_CHECK_VALUE(!weights.empty() && weights.size() <= kMaxLayers && biases.size() == weights.size(), "mlp: got ",
                    weights.size(), " weights and ", biases.size(), " biases; expected as many, 1 to ", kMaxLayers);
  Network network{};
  network.factors = parse_factors(factors);
  network.parameters = dtype_of(weights[0], "mlp", "a weight");
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& w = weights[l];
    const std::optional<Tensor> b = biases.get(l);
    TORCH_CHECK_VALUE(w.dim() == 2 && w.is_contiguous() && w.scalar_type() == weights[0].scalar_type() &&
                          w.size(0) >= 1 && w.size(1) >= 1 && w.size(0) <= kMaxWidth && w.size(1) <= kMaxWidth &&
                          (l == 0 || w.size(1) == weights[l - 1].size(0)),
                      "mlp: weight ", l, " has dtype ", w.scalar_type(), " and shape ", w.sizes(),
                      "; expected contiguous weights of one dtype that follow one another, 1 to ", kMaxWidth, " wide");
    TORCH_CHECK_VALUE(!b || (b->is_contiguous() && b->scalar_type() == w.scalar_type() && b->dim() == 1 &&
                             b->size(0) == w.size(0) && b->device() == w.device()),
                      "mlp: bias ", l, " does not fit its weight; expected (", w.size(0), ",) of its dtype, beside it");
    const bool last = l + 1 == weights.size();
    network.layers[network.count++] = {w.const_data_ptr(),
                                       b ? b->const_data_ptr() : nullptr,
                                       int(w.size(1)),
                                       int(w.size(0)),
                                       last ? Activation::none : activation,
                                       -1,
                                       -1};
  }
  return network;
}

void check_input(const Tensor& input, const Tensor& weight, const Network& network) {
  TORCH_CHECK(input.device() == weight.device(), "mlp: input is on ", input.device(), " and weights on ",
              weight.device(), "; expected the same device; move one of them with .to()");
  TORCH_CHECK_VALUE(input.dim() >= 1 && input.size(-1) == network.inputs(), "mlp: input has shape ", input.sizes(),
                    "; expected (*, ", network.inputs(), ")");
}

void check_fits(const Network& network, bool trains, at::Device device) {
  TORCH_CHECK_VALUE(fits(network, trains, shared_bytes()), "mlp: the weights do not fit into the shared memory of ",
                    device);
}

Tensor forward(const Tensor& input, at::TensorList weights, const c10::List<std::optional<Tensor>>& biases,
               c10::string_view activation, c10::string_view factors) {
  const Network network = network_of(weights, biases, parse_activation(activation, "mlp"), factors);
  check_input(input, weights[0], network);
  const c10::DeviceGuard guard(input.device());
  check_fits(network, false, input.device());
  const Tensor x = input.contiguous();
  at::DimVector sizes(input.sizes());
  sizes.back() = network.outputs();
  const Tensor output = at::empty(sizes, input.options().dtype(scalar_type_of(network.factors)));
  const Infer args{network,
                   input.numel() / network.inputs(),
                   dtype_of(x, "mlp", "input"),
                   kept_in(network.factors),
                   x.const_data_ptr(),
                   output.mutable_data_ptr()};
  run_on(input.device(), "mlp", no_forward_on_cpu, GDBP_CUDA_LAUNCHER(infer_cuda), args);
  return output;
}

// From the gradient of the output, that of the input, if the first of `mask` asks for it (else undefined), and in one
// piece those of weight, bias, weight, ..., where the others of it do; float32, for the pieces to be cast. The forward
// pass is made again.
std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, at::TensorList weights,
                                    const c10::List<std::optional<Tensor>>& biases, c10::string_view activation,
                                    c10::string_view factors, const c10::List<bool>& mask) {
  Network network = network_of(weights, biases, parse_activation(activation, "mlp"), factors);
  check_input(input, weights[0], network);
  TORCH_CHECK_VALUE(mask.size() == 1 + 2 * weights.size(), "mlp_backward: mask has ", mask.size(),
                    " elements; expected one for the input and two for each layer");
  at::DimVector sizes(input.sizes());
  sizes.back() = network.outputs();
  TORCH_CHECK_VALUE(grad_output.sizes() == sizes && grad_output.device() == input.device(),
                    "mlp_backward: grad_output has shape ", grad_output.sizes(), " on ", grad_output.device(),
                    "; expected ", at::IntArrayRef(sizes), " on ", input.device());
  int64_t gradients = 0;
  const auto place = [&](bool wanted, int64_t size) {
    const int64_t at = wanted ? gradients : -1;
    if (wanted) gradients += size;
    return at;
  };
  for (int l = 0; l < network.count; ++l) {
    Layer& layer = network.layers[l];
    layer.weight_at = place(mask[1 + 2 * l], int64_t(layer.inputs) * layer.outputs);
    layer.bias_at = place(mask[2 + 2 * l] && layer.bias != nullptr, layer.outputs);
  }
  const c10::DeviceGuard guard(input.device());
  check_fits(network, true, input.device());
  const Tensor x = input.contiguous(), dy = grad_output.contiguous();
  const Tensor grad_input = mask[0] ? at::empty_like(x) : Tensor();
  const int64_t rows = input.numel() / network.inputs(), blocks = blocks_for(network, rows, shared_bytes());
  const Tensor partials = at::empty({blocks, gradients}, input.options().dtype(at::kFloat));
  Train args{};
  args.network = network;
  args.rows = rows;
  args.input_dtype = dtype_of(x, "mlp_backward", "input");
  args.target_dtype = dtype_of(dy, "mlp_backward", "grad_output");
  args.input = x.const_data_ptr();
  args.target = dy.const_data_ptr();
  args.objective = Objective::upstream;
  args.gradients = gradients;
  args.partials = partials.mutable_data_ptr<float>();
  args.input_gradient = grad_input.defined() ? grad_input.mutable_data_ptr() : nullptr;
  run_on(input.device(), "mlp_backward", no_backward_on_cpu, GDBP_CUDA_LAUNCHER(train_cuda), args);
  return {grad_input, at::sum(partials, 0)};
}

// Whether mlp() takes them, on this device, and where it `trains` mlp_backward(), too.
bool fits_on(const Tensor& input, at::TensorList weights, const c10::List<std::optional<Tensor>>& biases,
             c10::string_view activation, c10::string_view factors, bool trains) {
  const c10::DeviceGuard guard(input.device());
  for (const Tensor& w : weights)
    if (w.dim() != 2 || !w.is_contiguous() || w.size(0) > kMaxWidth || w.size(1) > kMaxWidth) return false;
  if (weights.size() > kMaxLayers) return false;
  Network network = network_of(weights, biases, parse_activation(activation, "mlp"), factors);
  for (int l = 0; l < network.count; ++l) network.layers[l].weight_at = network.layers[l].bias_at = trains ? 0 : -1;
  return fits(network, trains, shared_bytes());
}

}  // namespace

Factors parse_factors(std::string_view name) {
  for (Factors factors : {Factors::bfloat16, Factors::float16, Factors::tf32, Factors::float32})
    if (name == kFactorNames[int(factors)]) return factors;
  TORCH_CHECK_VALUE(false, "mlp: factors is '", name, "'; expected bfloat16, float16, tf32 or float32");
}

#ifdef GDBP_WITH_CUDA
int shared_bytes() { return shared_bytes_cuda(); }
#else
int shared_bytes() { return 0; }
#endif

TORCH_LIBRARY_FRAGMENT(gdbp, m) {
  m.def("mlp(Tensor input, Tensor[] weights, Tensor?[] biases, str activation, str factors) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "mlp_fits(Tensor input, Tensor[] weights, Tensor?[] biases, str activation, str factors, bool trains) -> "
      "bool");
  m.def(
      "mlp_backward(Tensor grad_output, Tensor input, Tensor[] weights, Tensor?[] biases, str activation, str factors, "
      "bool[] mask) -> (Tensor grad_input, Tensor grads)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(gdbp, CUDA, m) {
  m.impl("mlp", &forward);
  m.impl("mlp_backward", &backward);
  m.impl("mlp_fits", &fits_on);
}

}  // namespace gdbp::mlp
