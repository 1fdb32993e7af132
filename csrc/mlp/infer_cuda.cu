// To infer: weights and biases lie in a block's shared memory, and each warp takes rows through the whole network in
// its registers, without waiting for the others. What a product leaves with a lane is what the next one wants from it
// (mma_cuda.cuh), and so is what the lane reads of the input, eight neighbours of a row at a time, once the first
// weight's columns are in another order; likewise the output and the last weight's rows.
#include <algorithm>

#include "mlp/block_cuda.cuh"
#include "mlp/mlp_math.h"

namespace gdbp::mlp {
namespace {

using cuda::Element;
using cuda::pair_at;
using cuda::pair_of;
using cuda::set_pair;

// As many as have the registers that they need: 128 and 255, of 65536.
template <int widest>
constexpr int kInferThreads = widest <= 64 ? 512 : 256;
// A weight that is read serves two products, where there are registers for it.
template <class Factor>
constexpr int kTiles = sizeof(Element<Factor>) == 2 ? 2 : 1;

// Of each 32 columns of a matrix a product wants from lane t, and leaves with it, 2t and 2t + 1 of each of 4 parts
// of 8. Where a column is among those parts if the lane's 8 are to be neighbours, 8t and further:
__device__ __forceinline__ int place_of(int column) {
  return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

// A product's sum, or an activation, as a factor of the next.
template <class Factor, class Pair>
__device__ __forceinline__ Pair as_factor(Pair x) {
  if constexpr (std::is_same_v<Factor, cuda::Tf32>) {
    return Pair::of(bit_cast<float>(cuda::to_tf32(x.low())), bit_cast<float>(cuda::to_tf32(x.high())));
  } else {
    return x;
  }
}

template <class Op, class Pair>
__device__ __forceinline__ Pair forward(Op op, Pair x) {
#ifdef __CUDA_ARCH__
  // One instruction instead of seven.
  if constexpr (std::is_same_v<Op, Relu> && std::is_same_v<Pair, cuda::Pair<BFloat16>>) {
    Pair y;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y.bits) : "r"(x.bits), "r"(0));
    return y;
  } else if constexpr (std::is_same_v<Op, Relu> && std::is_same_v<Pair, cuda::Pair<Float16>>) {
    Pair y;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(y.bits) : "r"(x.bits), "r"(0));
    return y;
  }
#endif
  return Pair::of(op.forward(x.low()), op.forward(x.high()));
}

// Of a warp: kTiles times 16 rows, `widest` columns.
template <class Factor, int widest>
struct Rows {
  using T = Element<Factor>;
  using Pair = cuda::Pair<T>;
  static constexpr int tiles = kTiles<Factor>, depths = widest / 16, count = tiles * 16;

  FragmentA<Factor> at[tiles][depths];

  // f(row, column, pairs from there on) for what a lane holds of `steps` parts, which are parts `k` and further of all:
  // 4 neighbouring columns of each.
  template <int steps, class F>
  __device__ __forceinline__ void for_rows(int from, int k, const F& f) {
    const int g = cuda::lane_id() / 4, t = cuda::lane_id() % 4;
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        Pair pairs[2 * steps];
#pragma unroll
        for (int j = 0; j < 2 * steps; ++j) pairs[j] = pair_of(at[tile][from + j / 2], below + j % 2 * 2);
        f(tile * 16 + below * 8 + g, k / 2 * 32 + 8 * t + k % 2 * 4, pairs);
#pragma unroll
        for (int j = 0; j < 2 * steps; ++j) set_pair(at[tile][from + j / 2], below + j % 2 * 2, pairs[j]);
      }
    }
  }
  // For all of them 8 columns at a time, where f is short, ...
  template <class F>
  __device__ __forceinline__ void for_eights(const F& f) {
#pragma unroll
    for (int k = 0; k < depths; k += 2) for_rows<2>(k, k, f);
  }
  // ... and 4 at a time where its code is not to be repeated: registers have no indices, so all move on.
  template <class F>
  __device__ __forceinline__ void for_fours(const F& f) {
#pragma unroll 1
    for (int k = 0; k < depths; ++k) {
      for_rows<1>(0, k, f);
      rotate();
    }
  }

  __device__ __forceinline__ void rotate() {
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
      const FragmentA<Factor> first = at[tile][0];
#pragma unroll
      for (int k = 0; k + 1 < depths; ++k) at[tile][k] = at[tile][k + 1];
      at[tile][depths - 1] = first;
    }
  }
};

template <class Factor, int widest>
struct Inference {
  using T = Element<Factor>;
  using Pair = cuda::Pair<T>;
  using Fragments = Rows<Factor, widest>;
  static constexpr int tiles = Fragments::tiles, depths = Fragments::depths;

  const Infer& a;
  const Parameters& at;
  unsigned char* shared;

  __device__ __forceinline__ T* weight(int l) const { return reinterpret_cast<T*>(shared + at.weight[l]); }
  // Each pair twice, as a lane wants it for its two rows.
  __device__ __forceinline__ FragmentC* bias(int l) const { return reinterpret_cast<FragmentC*>(shared + at.bias[l]); }

  __device__ __forceinline__ void load_parameters() const {
#pragma unroll 1
    for (int l = 0; l < a.network.count; ++l) {
      const bool is_first = l == 0, is_last = l + 1 == a.network.count;
      const int depth = Parameters::depth(a.network, l), stride = Parameters::stride(depth);
      T* const to = weight(l);
      FragmentC* const pairs = bias(l);
      load_layer(
          a.network.layers[l], a.network.parameters, Parameters::width(a.network, l), depth,
          [&](int n, int k, const float (&w)[4]) {
            T* const row = to + (is_last ? place_of(n) : n) * stride;
            pair_at(row + (is_first ? place_of(k) : k)) = as_factor<Factor>(Pair::of(w[0], w[1]));
            pair_at(row + (is_first ? place_of(k + 2) : k + 2)) = as_factor<Factor>(Pair::of(w[2], w[3]));
          },
          [&](int n, float b) {
            const int place = is_last ? place_of(n) : n;
            pairs[place / 2].r[place % 2] = pairs[place / 2].r[place % 2 + 2] = b;
          });
    }
  }

  // `rows` rows of the input; the others become anything.
  template <class X>
  __device__ __forceinline__ void read(const X* input, int rows, Fragments& x) const {
    const int cols = a.network.inputs();
    if (cols % 8 == 0 && cuda::aligned_for<8>(input)) {
      x.for_eights([&](int row, int column, Pair(&pairs)[4]) {
        // From an address that always exists. What there is not becomes 0 afterwards, which also moves the registers of
        // a load to where products want them, once: the compiler would do so before each product.
        const bool inside = column < cols;
        const X* const from = input + (row < rows ? row : 0) * cols + (inside ? column : 0);
        if constexpr (sizeof(T) == 2 && std::is_same_v<X, T>) {
          const auto four = *reinterpret_cast<const uint4*>(from);
          pairs[0].bits = inside ? four.x : 0;
          pairs[1].bits = inside ? four.y : 0;
          pairs[2].bits = inside ? four.z : 0;
          pairs[3].bits = inside ? four.w : 0;
        } else {
          const auto packed = *reinterpret_cast<const cuda::Packed<X, 8>*>(from);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const Pair pair = input_pair(packed.at[2 * j], packed.at[2 * j + 1]);
            pairs[j] = inside ? pair : Pair{};
          }
        }
      });
    } else {
      x.for_fours([&](int row, int column, Pair(&pairs)[2]) {
        const X* const from = input + row * cols + column;
        const int inside = row < rows ? cols - column : 0;
#pragma unroll
        for (int j = 0; j < 2; ++j)
          pairs[j] = input_pair(2 * j < inside ? from[2 * j] : X{}, 2 * j + 1 < inside ? from[2 * j + 1] : X{});
      });
    }
  }
  template <class X>
  __device__ __forceinline__ static Pair input_pair(X low, X high) {
    return as_factor<Factor>(Pair::of(float(cuda::widen_fast(low)), float(cuda::widen_fast(high))));
  }

  // The output has the type of the factors.
  __device__ __forceinline__ void write(Fragments& y, T* output, int rows) const {
    const int cols = a.network.outputs();
    const auto low = [](Pair pair) { return cuda::narrow_fast<T>(pair.low()); };
    const auto high = [](Pair pair) { return cuda::narrow_fast<T>(pair.high()); };
    if (cols % 8 == 0 && cuda::aligned_for<8>(output)) {
      y.for_eights([&](int row, int column, Pair(&pairs)[4]) {
        T* const to = output + row * cols + column;
        if (row >= rows || column >= cols) return;
        if constexpr (sizeof(T) == 2) {
          __stwb(reinterpret_cast<uint4*>(to), uint4{pairs[0].bits, pairs[1].bits, pairs[2].bits, pairs[3].bits});
        } else {
          cuda::Packed<T, 8> packed;
#pragma unroll
          for (int j = 0; j < 4; ++j) packed.at[2 * j] = low(pairs[j]), packed.at[2 * j + 1] = high(pairs[j]);
#pragma unroll
          for (int k = 0; k < int(sizeof(packed) / 16); ++k)
            __stwb(reinterpret_cast<uint4*>(to) + k, reinterpret_cast<const uint4*>(&packed)[k]);
        }
      });
    } else {
      y.for_fours([&](int row, int column, Pair(&pairs)[2]) {
        T* const to = output + row * cols + column;
        const int inside = row < rows ? cols - column : 0;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (2 * j < inside) to[2 * j] = low(pairs[j]);
          if (2 * j + 1 < inside) to[2 * j + 1] = high(pairs[j]);
        }
      });
    }
  }

  // y = x w^T + bias, 16 columns of it from row n of w on, to part `to` of y. full: whether x is `widest`.
  template <bool full>
  __device__ __forceinline__ void multiply(const Fragments& x, const T* w, const FragmentC* bias, int depth, int n,
                                           Fragments& y, int to) const {
    const int stride = Parameters::stride(full ? widest : depth);
    FragmentC c[tiles][2];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const FragmentC sums = bias[n / 2 + part * 4 + cuda::lane_id() % 4];
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile) c[tile][part] = sums;
    }
#pragma unroll
    for (int k = 0; k < depths; ++k) {
      if (!full && k * 16 >= depth) break;
      FragmentB<Factor> left, right;
      cuda::load_b_transposed<Factor, true>(w + n * stride + k * 16, stride, left, right);
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile) {
        cuda::multiply<Factor>(c[tile][0], x.at[tile][k], left);
        cuda::multiply<Factor>(c[tile][1], x.at[tile][k], right);
      }
    }
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const pair = c[tile][i / 2].r + i % 2 * 2;
        set_pair(y.at[tile][to], i, Pair::of(pair[0], pair[1]));
      }
    }
  }
  __device__ __forceinline__ void multiply(const Fragments& x, int l, int depth, int width, Fragments& y) const {
    const T* const w = weight(l);
    const FragmentC* const b = bias(l);
    // Of float32 the factors are split for each product; the compiler would keep all parts of an unrolled loop's.
    if (!std::is_same_v<Factor, cuda::Fp32> && depth == widest && width == widest) {
#pragma unroll
      for (int n = 0; n < depths; ++n) multiply<true>(x, w, b, depth, n * 16, y, n);
    } else {
#pragma unroll 1
      for (int n = 0; n < widest; n += 16) {
        if (n < width) multiply<false>(x, w, b, depth, n, y, 0);
        y.rotate();
      }
    }
  }

  // The next layer's factors from what multiply() left, which was rounded as the output of a layer of its own is.
  __device__ __forceinline__ void activate(Activation activation, int width, Fragments& y, Fragments& x) const {
    for_activation<T>(activation, [&](auto op) {
      const auto apply = [&](const FragmentA<Factor>& from, FragmentA<Factor>& to) {
#pragma unroll
        for (int i = 0; i < 4; ++i) set_pair(to, i, as_factor<Factor>(forward(op, pair_of(from, i))));
      };
      if constexpr (std::is_same_v<decltype(op), None> || std::is_same_v<decltype(op), Relu>) {
#pragma unroll
        for (int k = 0; k < depths; ++k) {
#pragma unroll
          for (int tile = 0; tile < tiles; ++tile) apply(y.at[tile][k], x.at[tile][k]);
        }
      } else {
#pragma unroll 1
        for (int k = 0; k < depths; ++k) {
#pragma unroll
          for (int tile = 0; tile < tiles; ++tile)
            if (k * 16 < width) apply(y.at[tile][0], y.at[tile][0]);
          y.rotate();
        }
        x = y;
      }
    });
  }

  __device__ __forceinline__ void layers(Fragments& x, Fragments& y) const {
#pragma unroll 1
    for (int l = 0;; ++l) {
      const int depth = Parameters::depth(a.network, l), width = Parameters::width(a.network, l);
      multiply(x, l, depth, width, y);
      if (l + 1 == a.network.count) return;
      activate(a.network.layers[l].activation, width, y, x);
    }
  }
};

template <class Factor, int widest>
__global__ void __launch_bounds__(kInferThreads<widest>, 1)
    infer_kernel(GDBP_GRID_CONSTANT(Infer) a, GDBP_GRID_CONSTANT(Parameters) at, unsigned tiles) {
  GDBP_DYNAMIC_SHARED(unsigned char, shared);
  using Here = Inference<Factor, widest>;
  const Here here{a, at, shared};
  here.load_parameters();
  __syncthreads();
  // The first warp of every block, then the second of every block: few rows are spread over all blocks.
#pragma unroll 1
  for (unsigned tile = warp_id() * gridDim.x + blockIdx.x; tile < tiles; tile += blockDim.x / kWarp * gridDim.x) {
    constexpr int count = Here::Fragments::count;
    const int64_t left = a.rows - int64_t(tile) * count;
    const int rows = left < count ? int(left) : count;
    typename Here::Fragments x, y;
    cuda::for_narrow_dtype(a.input_dtype, [&](auto type) {
      using X = typename decltype(type)::type;
      here.read(static_cast<const X*>(a.input) + tile * int64_t(count * a.network.inputs()), rows, x);
    });
    here.layers(x, y);
    here.write(y, static_cast<Element<Factor>*>(a.output) + tile * int64_t(count * a.network.outputs()), rows);
  }
}

#ifdef GDBP_CUDASIM
int multiprocessors() { return 3; }
#else
int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}
#endif

template <class Factor, int widest>
int launch(const Infer& args, void* stream) {
  const auto kernel = infer_kernel<Factor, widest>;
  const Parameters at(args.network);
  if (const int error = GDBP_ALLOW_SHARED(kernel, shared_bytes_cuda())) return error;
  // A block takes all registers of a multiprocessor.
  constexpr int threads = kInferThreads<widest>, rows = Rows<Factor, widest>::count;
  const int64_t tiles = (args.rows + rows - 1) / rows;
  const int64_t blocks = std::min<int64_t>({tiles, args.most_blocks, multiprocessors()});
  return GDBP_LAUNCH(kernel, unsigned(blocks), threads, at.bytes, stream, args, at, unsigned(tiles));
}

}  // namespace

int infer_cuda(const Infer& args, void* stream) {
  if (args.rows == 0) return 0;
  int widest = args.network.inputs();
  for (int l = 0; l < args.network.count; ++l) widest = std::max(widest, args.network.layers[l].outputs);
  return with_factors(args.network, [&](auto factors) {
    using Factor = typename decltype(factors)::type;
    return widest <= 64 ? launch<Factor, 64>(args, stream) : launch<Factor, 128>(args, stream);
  });
}

}  // namespace gdbp::mlp
