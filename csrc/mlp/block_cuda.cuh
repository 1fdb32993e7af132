// What the kernels of whole networks share.
#pragma once
#include "common/activations_cuda.cuh"
#include "common/mma_cuda.cuh"
#include "mlp/mlp.h"

namespace gdbp::mlp {
namespace {

using cuda::for_activation;
using cuda::FragmentA;
using cuda::FragmentB;
using cuda::FragmentC;
using cuda::kWarp;

__device__ __forceinline__ int warp_id() { return int(threadIdx.x) / kWarp; }

// put(n, k, four values of row n from k on) for a weight, with zeros around it up to `rows` and `cols`. A warp takes 8
// rows at a time, all of which it asks for before it waits for the first.
template <bool in_fours, class P, class Put>
__device__ __forceinline__ void load_weight(const Layer& layer, int rows, int cols, const Put& put) {
  constexpr int at_once = 8;
  static_assert(kMaxWidth == kWarp * 4);
  const P* const weight = static_cast<const P*>(layer.weight);
  const int k = cuda::lane_id() * 4, inputs = layer.inputs, warps = int(blockDim.x) / kWarp;
#pragma unroll 1
  for (int first = warp_id(); first < rows; first += at_once * warps) {
    P w[at_once][4];
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      const int n = first + i * warps, inside = n < layer.outputs ? inputs - k : 0;
      if constexpr (in_fours) {
        const auto four = *reinterpret_cast<const cuda::Packed<P, 4>*>(weight + (inside > 0 ? n * inputs + k : 0));
#pragma unroll
        for (int j = 0; j < 4; ++j) w[i][j] = inside > 0 ? four.at[j] : P{};
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) w[i][j] = j < inside ? weight[n * inputs + k + j] : P{};
      }
    }
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      const int n = first + i * warps;
      if (n >= rows || k >= cols) break;
      const auto value = [&](int j) { return float(cuda::widen_fast(w[i][j])); };
      put(n, k, {value(0), value(1), value(2), value(3)});
    }
  }
}

// A layer's parameters for all threads of a block to put where it holds them; put_bias(n, value).
template <class Weight, class Bias>
__device__ __forceinline__ void load_layer(const Layer& layer, Dtype parameters, int rows, int cols,
                                           const Weight& put_weight, const Bias& put_bias) {
  cuda::for_narrow_dtype(parameters, [&](auto type) {
    using P = typename decltype(type)::type;
    if (layer.inputs % 4 == 0 && cuda::aligned_for<4>(static_cast<const P*>(layer.weight))) {
      load_weight<true, P>(layer, rows, cols, put_weight);
    } else {
      load_weight<false, P>(layer, rows, cols, put_weight);
    }
    const P* const bias = static_cast<const P*>(layer.bias);
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
