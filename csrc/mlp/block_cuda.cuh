// What the kernels of whole networks share.
#pragma once
#include "common/mma_cuda.cuh"
#include "mlp/mlp.h"

namespace gdbp::mlp {
namespace {

using cuda::FragmentA;
using cuda::FragmentB;
using cuda::FragmentC;
using cuda::kWarp;

__device__ __forceinline__ int warp_id() { return int(threadIdx.x) / kWarp; }

// As dispatch() of activations.h, on the device. All lanes take the same branch.
template <class F>
__device__ __forceinline__ void for_activation(Activation activation, const F& f) {
  switch (activation) {
#define GDBP_ROW(name, Op) \
  case Activation::name: return f(Op{});
    GDBP_ACTIVATIONS(GDBP_ROW)
#undef GDBP_ROW
  }
}

// A layer's weight and bias for all threads of a block to put where it holds them, with zeros around them up to `rows`
// and `cols`: put_weight(n, k, four values of row n from k on), put_bias(n, value). A warp takes a row at a time, in
// fours that are read at once where all begin at such an address.
template <class Weight, class Bias>
__device__ __forceinline__ void load_layer(const Layer& layer, Dtype parameters, int rows, int cols,
                                           const Weight& put_weight, const Bias& put_bias) {
  cuda::for_dtype(parameters, [&](auto type) {
    using P = typename decltype(type)::type;
    const P *const weight = static_cast<const P*>(layer.weight), *const bias = static_cast<const P*>(layer.bias);
    const bool vectors = layer.inputs % 4 == 0 && cuda::aligned_for<4>(weight);
    const int k = cuda::lane_id() * 4, inside = layer.inputs - k < 4 ? layer.inputs - k : 4;
    static_assert(kMaxWidth == kWarp * 4);
#pragma unroll 8
    for (int n = warp_id(); n < rows; n += int(blockDim.x) / kWarp) {
      float w[4];
      cuda::load(weight + int64_t(n) * layer.inputs + k, n < layer.outputs && inside > 0 ? inside : 0, vectors, w);
      if (k < cols) put_weight(n, k, w);
    }
    for (int n = int(threadIdx.x); n < rows; n += int(blockDim.x))
      put_bias(n, bias != nullptr && n < layer.outputs ? float(cuda::widen_fast(bias[n])) : 0.0f);
  });
}

// f of what the factors of a network's products are.
template <class F>
int with_factors(const Network& network, const F& f) {
  switch (network.factors) {
    case Factors::bfloat16: return f(Type<BFloat16>{});
    case Factors::float16: return f(Type<Float16>{});
    case Factors::tf32: return f(Type<cuda::Tf32>{});
    default: return f(Type<cuda::Fp32>{});
  }
}

}  // namespace
}  // namespace gdbp::mlp
