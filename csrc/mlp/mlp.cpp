// The operators behind gdbp.nn.MLP: mlp, mlp_backward on CUDA, mlp_rows, mlp_rows_backward on the CPU.
#include "mlp/mlp.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>

#include <cstring>
#include <utility>

#include "common/binding.h"
#include "common/narrow_gemm_cpu.h"
#include "mlp/mlp_math.h"

namespace gdbp::mlp {
namespace {

using at::Tensor;

using Biases = c10::List<std::optional<Tensor>>;

// There are no such launchers for the CPU.
int no_forward_on_cpu(const Infer&, void*) { return 0; }
int no_backward_on_cpu(const Train&, void*) { return 0; }

at::ScalarType scalar_type_of(Factors factors) {
  return factors == Factors::bfloat16 ? at::kBFloat16 : factors == Factors::float16 ? at::kHalf : at::kFloat;
}

// Weights of shape (outputs, inputs), and a bias or None for each; the activation is that of all layers but the last.
Network network_of(const at::TensorList& weights, const Biases& biases, Activation activation,
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

void check_narrow(const Tensor& tensor, const char* argument, const char* op) {
  TORCH_CHECK_TYPE(is_supported(tensor.scalar_type()) && tensor.scalar_type() != at::kDouble, op, ": ", argument,
                   " has dtype ", tensor.scalar_type(),
                   "; expected float32, bfloat16 or float16; convert it with .to()");
}

void check_fits(const Network& network, bool trains, at::Device device) {
  TORCH_CHECK_VALUE(fits(network, trains, shared_bytes()), "mlp: the weights do not fit into the shared memory of ",
                    device);
}

Tensor forward(const Tensor& input, at::TensorList weights, const Biases& biases, c10::string_view activation,
               c10::string_view factors) {
  const Network network = network_of(weights, biases, parse_activation(activation, "mlp"), factors);
  check_narrow(input, "input", "mlp");
  check_narrow(weights[0], "a weight", "mlp");
  check_input(input, weights[0], network);
  const c10::DeviceGuard guard(input.device());
  check_fits(network, false, input.device());
  const Tensor x = input.contiguous();
  at::DimVector sizes(input.sizes());
  sizes.back() = network.outputs();
  const Tensor output = at::empty(sizes, input.options().dtype(scalar_type_of(network.factors)));
  const Infer args{network, input.numel() / network.inputs(), dtype_of(x, "mlp", "input"), x.const_data_ptr(),
                   output.mutable_data_ptr()};
  run_on(input.device(), "mlp", no_forward_on_cpu, GDBP_CUDA_LAUNCHER(infer_cuda), args);
  return output;
}

// From the gradient of the output, that of the input, if the first of `mask` asks for it (else undefined), and in one
// piece those of weight, bias, weight, ..., where the others of it do; float32, for the pieces to be cast. The forward
// pass is made again.
std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, at::TensorList weights,
                                    const Biases& biases, c10::string_view activation, c10::string_view factors,
                                    const c10::List<bool>& mask) {
  Network network = network_of(weights, biases, parse_activation(activation, "mlp"), factors);
  check_narrow(input, "input", "mlp_backward");
  check_narrow(weights[0], "a weight", "mlp_backward");
  check_narrow(grad_output, "grad_output", "mlp_backward");
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

// ---- on the CPU ----

using Names = c10::List<std::string>;

Network rows_network_of(const Tensor& input, at::TensorList weights, const Biases& biases, const Names& activations,
                        const char* op) {
  Network network = network_of(weights, biases, Activation::none, "float32");
  check_input(input, weights[0], network);
  check_same(weights[0], "a weight", input, "input", op);
  TORCH_CHECK_TYPE(network.parameters == Dtype::float32 || network.parameters == Dtype::float64, op,
                   ": input has dtype ", input.scalar_type(), "; expected float32 or float64; convert it with .to()");
  TORCH_CHECK_VALUE(activations.size() == weights.size(), op, ": got ", activations.size(), " activations and ",
                    weights.size(), " weights; expected as many, none for a layer without one");
  for (int l = 0; l < network.count; ++l)
    network.layers[l].activation = parse_activation(activations.get(size_t(l)), op);
  return network;
}

// Whether the backward pass reads the network's own output.
bool reads_output(const Network& network) {
  return saves(network.layers[network.count - 1].activation) == Saved::output;
}

Tensor empty_bytes(int64_t bytes, const Tensor& like) {
  return at::empty({bytes}, at::TensorOptions(at::kByte).device(like.device()));
}

// Hidden outputs and pre-activations, one behind the other in elements from `base`; returns how many there are. What
// lies between them is only read beside them; `clears` it so that all results are defined.
int64_t place_kept(const Network& network, int64_t rows, char* base, Kept& kept, bool clears = false) {
  const int64_t size = size_of(network.parameters), line = cpu::kVectorBytes / size;
  int64_t used = 0;
  const auto take = [&](int l) {
    void* const at = base ? base + used * size : nullptr;
    const int64_t end = used + rows * network.layers[l].outputs;
    used += (end - used + 2 * line - 1) / line * line;
    if (clears) std::memset(base + end * size, 0, size_t((used - end) * size));
    return at;
  };
  for (int l = 0; l < network.count; ++l) {
    if (l + 1 < network.count) kept.outputs[l] = take(l);
    if (keeps_apart(network.layers[l])) kept.saved[l] = take(l);
  }
  return used;
}

std::tuple<Tensor, Tensor> rows_forward(const Tensor& input, at::TensorList weights, const Biases& biases,
                                        const Names& activations, bool keeps) {
  const Network network = rows_network_of(input, weights, biases, activations, "mlp_rows");
  const Tensor x = input.contiguous();
  const int64_t rows = input.numel() / network.inputs();
  at::DimVector sizes(input.sizes());
  sizes.back() = network.outputs();
  const Tensor output = at::empty(sizes, input.options());
  Kept kept{};
  const Tensor all = at::empty({keeps ? place_kept(network, rows, nullptr, kept) : 0}, input.options());
  if (keeps) place_kept(network, rows, static_cast<char*>(all.mutable_data_ptr()), kept, true);
  kept.outputs[network.count - 1] = output.mutable_data_ptr();
  const Tensor workspace = empty_bytes(forward_bytes(network, rows), input);
  forward_cpu({network, rows, x.const_data_ptr(), kept, workspace.mutable_data_ptr()}, nullptr);
  return {output, all};
}

// The gradients that `mask` asks for, of input, weight, bias, weight, ..., in this order; biases themselves are not
// read. output: what mlp_rows returned, where the last activation's derivative needs it.
std::vector<Tensor> rows_backward(const Tensor& grad_output, const Tensor& input, const Tensor& kept,
                                  const std::optional<Tensor>& output, at::TensorList weights, const Names& activations,
                                  const c10::List<bool>& mask) {
  Biases none;
  none.resize(weights.size());
  Network network = rows_network_of(input, weights, none, activations, "mlp_rows_backward");
  const int64_t rows = input.numel() / network.inputs();
  TORCH_CHECK_VALUE(mask.size() == 1 + 2 * weights.size(), "mlp_rows_backward: mask has ", mask.size(),
                    " elements; expected one for the input and two for each layer");
  check_same(input, "input", grad_output, "grad_output", "mlp_rows_backward");
  check_same(input, "input", kept, "kept", "mlp_rows_backward");
  Kept places{};
  const int64_t elements = place_kept(network, rows, nullptr, places);
  TORCH_CHECK_VALUE(grad_output.numel() == rows * network.outputs() && kept.numel() == elements && kept.is_contiguous(),
                    "mlp_rows_backward: grad_output has shape ", grad_output.sizes(), " and kept ", kept.sizes(),
                    "; expected ", rows * network.outputs(), " elements and (", elements,
                    ",), as mlp_rows returned it");
  place_kept(network, rows, static_cast<char*>(kept.mutable_data_ptr()), places);
  Tensor y;
  if (reads_output(network)) {
    TORCH_CHECK_VALUE(output && output->numel() == grad_output.numel() && output->scalar_type() == input.scalar_type(),
                      "mlp_rows_backward: output is missing or does not fit; expected what mlp_rows returned");
    y = output->contiguous();
    places.outputs[network.count - 1] = y.mutable_data_ptr();
  }

  std::vector<Tensor> gradients;
  if (mask[0]) gradients.push_back(at::empty(input.sizes(), input.options()));
  int64_t total = 0;
  std::vector<int64_t> starts;
  const auto place = [&](bool wanted, at::IntArrayRef parameter) {
    if (!wanted) return int64_t(-1);
    starts.push_back(total);
    gradients.push_back(at::empty(parameter, input.options()));
    return std::exchange(total, total + gradients.back().numel());
  };
  for (int l = 0; l < network.count; ++l) {
    network.layers[l].weight_at = place(mask[1 + 2 * l], weights[l].sizes());
    network.layers[l].bias_at = place(mask[2 + 2 * l], {weights[l].size(0)});
  }
  const Tensor x = input.contiguous(), dy = grad_output.contiguous();
  const Tensor sums = at::empty({groups_for(network, rows), total}, input.options());
  const Tensor workspace = empty_bytes(backward_bytes(network, rows), input);
  backward_cpu({network, rows, x.const_data_ptr(), places, dy.const_data_ptr(),
                mask[0] ? gradients[0].mutable_data_ptr() : nullptr, total, sums.mutable_data_ptr(),
                workspace.mutable_data_ptr()},
               nullptr);
  // Copied, so that nobody's gradient holds on to those of all groups.
  for (size_t i = 0; i < starts.size(); ++i) {
    const Tensor& gradient = gradients[gradients.size() - starts.size() + i];
    std::memcpy(gradient.mutable_data_ptr(),
                static_cast<const char*>(sums.const_data_ptr()) + starts[i] * sums.element_size(), gradient.nbytes());
  }
  return gradients;
}

// Whether mlp() takes them, on this device, and where it `trains` mlp_backward(), too.
bool fits_on(const Tensor& input, at::TensorList weights, const Biases& biases, c10::string_view activation,
             c10::string_view factors, bool trains) {
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
  m.def(
      "mlp_rows(Tensor input, Tensor[] weights, Tensor?[] biases, str[] activations, bool keeps) -> (Tensor output, "
      "Tensor kept)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "mlp_rows_backward(Tensor grad_output, Tensor input, Tensor kept, Tensor? output, Tensor[] weights, "
      "str[] activations, bool[] mask) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(gdbp, CPU, m) {
  m.impl("mlp_rows", &rows_forward);
  m.impl("mlp_rows_backward", &rows_backward);
}

TORCH_LIBRARY_IMPL(gdbp, CUDA, m) {
  m.impl("mlp", &forward);
  m.impl("mlp_backward", &backward);
  m.impl("mlp_fits", &fits_on);
}

}  // namespace gdbp::mlp
