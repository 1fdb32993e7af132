// The operator behind gdbp.nn.MLP where nothing is to be differentiated.
#include "mlp/mlp.h"

#include <ATen/ops/empty.h>

#include "common/binding.h"
#include "mlp/mlp_math.h"

namespace gdbp::mlp {
namespace {

using at::Tensor;

bool takes(const Network& network) { return fits(network, false, shared_bytes()); }
// There is no such launcher for the CPU.
int no_cpu(const Infer&, void*) { return 0; }

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

Tensor forward(const Tensor& input, at::TensorList weights, const c10::List<std::optional<Tensor>>& biases,
               c10::string_view activation, c10::string_view factors) {
  const Network network = network_of(weights, biases, parse_activation(activation, "mlp"), factors);
  check_same(weights[0], "weights", input.to(weights[0].scalar_type()), "input", "mlp");
  TORCH_CHECK_VALUE(input.dim() >= 1 && input.size(-1) == network.inputs(), "mlp: input has shape ", input.sizes(),
                    "; expected (*, ", network.inputs(), ")");
  const c10::DeviceGuard guard(input.device());
  TORCH_CHECK_VALUE(takes(network), "mlp: the weights do not fit into the shared memory of ", input.device());
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
  run_on(input.device(), "mlp", no_cpu, GDBP_CUDA_LAUNCHER(infer_cuda), args);
  return output;
}

// Whether mlp() takes them, on this device.
bool fits_on(const Tensor& input, at::TensorList weights, const c10::List<std::optional<Tensor>>& biases,
             c10::string_view activation, c10::string_view factors) {
  const c10::DeviceGuard guard(input.device());
  for (const Tensor& w : weights)
    if (w.dim() != 2 || !w.is_contiguous() || w.size(0) > kMaxWidth || w.size(1) > kMaxWidth) return false;
  return weights.size() <= kMaxLayers &&
         takes(network_of(weights, biases, parse_activation(activation, "mlp"), factors));
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
  m.def("mlp_fits(Tensor input, Tensor[] weights, Tensor?[] biases, str activation, str factors) -> bool");
}

TORCH_LIBRARY_IMPL(gdbp, CUDA, m) {
  m.impl("mlp", &forward);
  m.impl("mlp_fits", &fits_on);
}

}  // namespace gdbp::mlp
