// To train: a tile of rows goes through the whole network in a block's shared memory, forward, loss and backward. Each
// warp has 16 rows, which it takes through the layers without waiting for the others; the gradients of the weights are
// products over all rows of the tile, and the warps share them out. Blocks take every gridDim.x-th tile; what they add
// up goes to the step (csrc/optim), which sums over blocks, in order.
#include "mlp/block_cuda.cuh"
#include "mlp/mlp_math.h"
#include "mlp/objective_cuda.cuh"

namespace gdbp::mlp {
namespace {

using cuda::pair_at;

constexpr int kMaxThreads = kMaxWarps * kWarp;
// Columns of a product that a warp computes at a time, and their parts.
constexpr int kColumns = 32, kParts = kColumns / 8;

// What a block holds. Factor: see mma_cuda.cuh.
template <class Factor>
struct Block {
  using T = cuda::Element<Factor>;
  using Pair = cuda::Pair<T>;

  const Network& net;
  const Layout& at;
  unsigned char* shared;

  __device__ __forceinline__ static int lane() { return cuda::lane_id(); }
  __device__ __forceinline__ static int stride_of(int width) { return mlp::stride_of(width, sizeof(T)); }
  __device__ __forceinline__ T* slab(int place) const { return reinterpret_cast<T*>(shared + place); }
  __device__ __forceinline__ float* floats(int place) const { return reinterpret_cast<float*>(shared + place); }
  // A slab's rows of this warp.
  __device__ __forceinline__ T* own(int place, int stride) const {
    return slab(place) + warp_id() * kWarpRows * stride;
  }

  __device__ void load_parameters() const {
#pragma unroll 1
    for (int l = 0; l < net.count; ++l) {
      const Layer& layer = net.layers[l];
      const int stride = stride_of(layer.inputs);
      T* const weight = slab(at.weight[l]);
      float* const bias = floats(at.bias[l]);
      load_layer(
          layer, net.parameters, padded(layer.outputs), padded(layer.inputs),
          [&](int n, int k, const float (&w)[4]) {
            pair_at(weight + n * stride + k) = Pair::of(w[0], w[1]);
            pair_at(weight + n * stride + k + 2) = Pair::of(w[2], w[3]);
          },
          [&](int n, float b) { bias[n] = b; });
    }
  }

  // Rows `first` and further of a matrix into this warp's, zeros behind the last; likewise in fours.
  __device__ void load_rows(const void* matrix, Dtype dtype, int cols, int64_t rows, int64_t first, int place) const {
    const int stride = stride_of(cols);
    T* const to = own(place, stride);
    cuda::for_narrow_dtype(dtype, [&](auto type) {
      using X = typename decltype(type)::type;
      const X* const from = static_cast<const X*>(matrix);
      const bool vectors = cols % 4 == 0 && cuda::aligned_for<4>(from);
      const int c = lane() * 4, inside = cols - c < 4 ? cols - c : 4;
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        const int64_t row = first + r;
        float x[4];
        cuda::load(from + row * cols + c, row < rows && inside > 0 ? inside : 0, vectors, x);
        if (c < padded(cols)) {
          pair_at(to + r * stride + c) = Pair::of(x[0], x[1]);
          pair_at(to + r * stride + c + 2) = Pair::of(x[2], x[3]);
        }
      }
    });
    __syncwarp();
  }
  // The input's, and where there is no objective those of the output's gradient: by the same code, of which there is
  // much.
  __device__ __forceinline__ void load_tile(const Train& a, int64_t first) const {
    const int matrices = a.objective == Objective::upstream ? 2 : 1;
#pragma unroll 1
    for (int i = 0; i < matrices; ++i) {
      load_rows(i == 0 ? a.input : a.target, i == 0 ? a.input_dtype : a.target_dtype,
                i == 0 ? net.inputs() : net.outputs(), a.rows, first,
                i == 0 ? at.input[0] : at.gradient(net.count - 1));
    }
  }

  // epilogue(column, c) for the warp's rows of x times w, kColumns columns at a time: w[k * stride + n], or of the
  // transposed w[n * stride + k].
  template <bool transposed, class Epilogue>
  __device__ __forceinline__ void multiply(const T* x, int x_stride, const T* w, int w_stride, int depth, int width,
                                           const Epilogue& epilogue) const {
    constexpr int most = kMaxWidth / 16;
    FragmentA<Factor> a[most];
#pragma unroll
    for (int k = 0; k < most; ++k)
      if (k * 16 < depth) a[k] = cuda::load_a<Factor>(x + k * 16, x_stride);
    // What follows may write where x was.
    __syncwarp();
#pragma unroll 1
    for (int n = 0; n < width; n += kColumns) {
      FragmentC c[kParts];
#pragma unroll
      for (int k = 0; k < most; ++k) {
        if (k * 16 >= depth) break;
#pragma unroll
        for (int part = 0; part < kParts; part += 2) {
          if (n + part * 8 >= width) break;
          FragmentB<Factor> left, right;
          if constexpr (transposed) {
            cuda::load_b_transposed<Factor>(w + (n + part * 8) * w_stride + k * 16, w_stride, left, right);
          } else {
            cuda::load_b<Factor>(w + k * 16 * w_stride + n + part * 8, w_stride, left, right);
          }
          cuda::multiply<Factor>(c[part], a[k], left);
          cuda::multiply<Factor>(c[part + 1], a[k], right);
        }
      }
      epilogue(n, c);
    }
  }

  // f(row, column, value, value of the next column), of the elements that a lane holds.
  template <class F>
  __device__ __forceinline__ static void for_pairs(int first_column, int width, FragmentC (&c)[kParts], const F& f) {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int column = first_column + part * 8 + 2 * t;
      if (first_column + part * 8 >= width) break;
      f(g, column, c[part].r[0], c[part].r[1]);
      f(g + 8, column, c[part].r[2], c[part].r[3]);
    }
  }

  __device__ void forward(int layers) const {
#pragma unroll 1
    for (int l = 0; l < layers; ++l) {
      const Layer& layer = net.layers[l];
      const int width = padded(layer.outputs), in_stride = stride_of(layer.inputs), stride = stride_of(layer.outputs);
      const float* const bias = floats(at.bias[l]);
      T* const output = own(at.input[l + 1], stride);
      T* const pre = at.pre[l] >= 0 ? own(at.pre[l], stride) : nullptr;
      multiply<true>(own(at.input[l], in_stride), in_stride, slab(at.weight[l]), stride_of(layer.inputs),
                     padded(layer.inputs), width, [&](int first, FragmentC(&c)[kParts]) {
                       for_pairs(first, width, c, [&](int row, int column, float& low, float& high) {
                         low += bias[column];
                         high += bias[column + 1];
                         if (pre != nullptr) {
                           // What the backward pass will see is what the activation gets.
                           const Pair rounded = Pair::of(low, high);
                           pair_at(pre + row * stride + column) = rounded;
                           low = rounded.low();
                           high = rounded.high();
                         }
                       });
                       for_activation<T>(layer.activation, [&](auto op) {
                         for_pairs(first, width, c, [&](int row, int column, float low, float high) {
                           pair_at(output + row * stride + column) = Pair::of(op.forward(low), op.forward(high));
                         });
                       });
                     });
      __syncwarp();
    }
  }

  // From the gradient of the pre-activation of layer l that of layer l - 1, or of the input to rows `first_row` and
  // further of `gradient`.
  __device__ void backward(int l, void* gradient, Dtype dtype, int64_t rows, int64_t first_row) const {
    const Layer& layer = net.layers[l];
    const int stride = stride_of(layer.inputs), out_stride = stride_of(layer.outputs), width = padded(layer.inputs);
    T* const saved = l > 0 ? own(at.gradient(l - 1), stride) : nullptr;
    multiply<false>(own(at.gradient(l), out_stride), out_stride, slab(at.weight[l]), stride, padded(layer.outputs),
                    width, [&](int first, FragmentC(&c)[kParts]) {
                      if (l == 0) return write_input_gradient(gradient, dtype, rows, first_row, first, c);
                      for_activation<T>(net.layers[l - 1].activation, [&](auto op) {
                        for_pairs(first, width, c, [&](int row, int column, float low, float high) {
                          Pair& pair = pair_at(saved + row * stride + column);
                          pair = Pair::of(op.backward(low, pair.low()), op.backward(high, pair.high()));
                        });
                      });
                    });
    __syncwarp();
  }

  __device__ void write_input_gradient(void* gradient, Dtype dtype, int64_t rows, int64_t first, int column,
                                       FragmentC (&c)[kParts]) const {
    const int inputs = net.inputs();
    cuda::for_narrow_dtype(dtype, [&](auto type) {
      using X = typename decltype(type)::type;
      X* const to = static_cast<X*>(gradient);
      for_pairs(column, padded(inputs), c, [&](int row, int k, float low, float high) {
        if (first + row >= rows) return;
        X* const pair = to + (first + row) * inputs + k;
        if (k < inputs) pair[0] = cuda::narrow_fast<X>(low);
        if (k + 1 < inputs) pair[1] = cuda::narrow_fast<X>(high);
      });
    });
  }

  // f(first output, first input) for the parts of a layer's weight that are this warp's, 16 x kColumns.
  template <class F>
  __device__ __forceinline__ void for_jobs(const Layer& layer, const F& f) const {
    const int across = (padded(layer.inputs) + kColumns - 1) / kColumns, count = padded(layer.outputs) / 16 * across;
#pragma unroll 1
    for (int job = warp_id(); job < count; job += at.warps) f(job / across * 16, job % across * kColumns);
  }
  // Where four elements of a part are among the sums in shared memory: a lane's beside one another.
  __device__ __forceinline__ float4& sums_at(int l, int n, int k, int part) const {
    const int tile = n / 16 * (padded(net.layers[l].inputs) / 8) + k / 8 + part;
    return reinterpret_cast<float4*>(floats(at.sums[l]))[tile * kWarp + lane()];
  }
  // f(place, of the element, value) for the elements of a part that there are in the weight.
  template <class F>
  __device__ __forceinline__ void for_elements(const Layer& layer, int n, int k, FragmentC (&c)[kParts],
                                               const F& f) const {
    for_pairs(k, padded(layer.inputs), c, [&](int row, int column, float& low, float& high) {
      const int64_t place = int64_t(n + row) * layer.inputs + column;
      const bool in_rows = n + row < layer.outputs;
      if (in_rows && column < layer.inputs) f(place, low);
      if (in_rows && column + 1 < layer.inputs) f(place + 1, high);
    });
  }

  // Adds this tile's gradient of a weight to those before it. All rows of the tile have to be there.
  __device__ void add_weight(int l, bool first_tile, float* gradients) const {
    const Layer& layer = net.layers[l];
    const int in_stride = stride_of(layer.inputs), out_stride = stride_of(layer.outputs), rows = at.warps * kWarpRows;
    const int width = padded(layer.inputs);
    const T *const x = slab(at.input[l]), *const dz = slab(at.gradient(l));
    float* const before = gradients + layer.weight_at;
    for_jobs(layer, [&](int n, int k) {
      // The products are added to the sums, all of which are asked for before the first is needed.
      FragmentC c[kParts];
      if (!first_tile && at.sums[l] >= 0) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          if (k + part * 8 >= width) break;
          const float4 sum = sums_at(l, n, k, part);
          c[part] = {{sum.x, sum.y, sum.z, sum.w}};
        }
      } else if (!first_tile) {
        for_elements(layer, n, k, c, [&](int64_t place, float& sum) { sum = before[place]; });
      }
#pragma unroll 2
      for (int row = 0; row < rows; row += 16) {
        const FragmentA<Factor> a = cuda::load_a_transposed<Factor>(dz + row * out_stride + n, out_stride);
#pragma unroll
        for (int part = 0; part < kParts; part += 2) {
          if (k + part * 8 >= width) break;
          FragmentB<Factor> left, right;
          cuda::load_b<Factor>(x + row * in_stride + k + part * 8, in_stride, left, right);
          cuda::multiply<Factor>(c[part], a, left);
          cuda::multiply<Factor>(c[part + 1], a, right);
        }
      }
      if (at.sums[l] < 0) return for_elements(layer, n, k, c, [&](int64_t place, float sum) { before[place] = sum; });
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (k + part * 8 >= width) break;
        sums_at(l, n, k, part) = {c[part].r[0], c[part].r[1], c[part].r[2], c[part].r[3]};
      }
    });
  }

  // The same of a bias, of the warp's own rows.
  __device__ void add_bias(int l, bool first_tile) const {
    const int width = padded(net.layers[l].outputs), stride = stride_of(net.layers[l].outputs);
    const T* const dz = own(at.gradient(l), stride);
    float* const sums = floats(at.bias_sums[l]) + warp_id() * width;
    for (int c = 2 * lane(); c < width; c += 2 * kWarp) {
      float low = 0, high = 0;
#pragma unroll
      for (int row = 0; row < kWarpRows; ++row) {
        const Pair pair = pair_at(dz + row * stride + c);
        low += pair.low();
        high += pair.high();
      }
      sums[c] = first_tile ? low : sums[c] + low;
      sums[c + 1] = first_tile ? high : sums[c + 1] + high;
    }
  }

  // What a block has added up, to where the step reads it.
  __device__ void write_sums(float* gradients) const {
    for (int l = 0; l < net.count; ++l) {
      const Layer& layer = net.layers[l];
      if (at.sums[l] >= 0) {
        for_jobs(layer, [&](int n, int k) {
          FragmentC c[kParts];
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            if (k + part * 8 >= padded(layer.inputs)) break;
            const float4 sum = sums_at(l, n, k, part);
            c[part] = {{sum.x, sum.y, sum.z, sum.w}};
          }
          for_elements(layer, n, k, c, [&](int64_t place, float sum) { gradients[layer.weight_at + place] = sum; });
        });
      }
      if (layer.bias_at < 0) continue;
      const int width = padded(layer.outputs);
      const float* const sums = floats(at.bias_sums[l]);
      for (int n = int(threadIdx.x); n < layer.outputs; n += int(blockDim.x)) {
        float sum = 0;
        for (int w = 0; w < at.warps; ++w) sum += sums[w * width + n];
        gradients[layer.bias_at + n] = sum;
      }
    }
  }
};

template <class Factor>
__global__ void __launch_bounds__(kMaxThreads)
    train_kernel(GDBP_GRID_CONSTANT(Train) a, GDBP_GRID_CONSTANT(Layout) at, int64_t tiles) {
  GDBP_DYNAMIC_SHARED(unsigned char, shared);
  const Block<Factor> block{a.network, at, shared};
  const int last = a.network.count - 1, stride = Block<Factor>::stride_of(a.network.outputs());
  float* const gradients = a.partials + blockIdx.x * a.gradients;
  block.load_parameters();
  __syncthreads();
  const bool upstream = a.objective == Objective::upstream;
  Found found;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const bool first_tile = tile == blockIdx.x;
    const int64_t first = (tile * at.warps + warp_id()) * kWarpRows;
    block.load_tile(a, first);
    block.forward(upstream ? last : last + 1);
    cuda::Element<Factor>* const output = block.own(at.gradient(last), stride);
    if (a.objective == Objective::cross_entropy) {
      cross_entropy(a, output, stride, first, found);
    } else if (a.objective == Objective::mse) {
      cuda::for_dtype(a.target_dtype, [&](auto type) {
        using Y = typename decltype(type)::type;
        mean_square(a, static_cast<const Y*>(a.target), output, stride, first, found);
      });
    }
    found.total += found.loss;
    found.loss = 0;
    __syncwarp();
#pragma unroll 1
    for (int l = last; l >= 0; --l) {
      const Layer& layer = a.network.layers[l];
      if (layer.bias_at >= 0) block.add_bias(l, first_tile);
      __syncthreads();
      if (layer.weight_at >= 0) block.add_weight(l, first_tile, gradients);
      // The next gradient, or the next tile's input, takes the place of what the others may still be reading.
      __syncthreads();
      if (l > 0 || a.input_gradient != nullptr) block.backward(l, a.input_gradient, a.input_dtype, a.rows, first);
    }
  }
  block.write_sums(gradients);
  if (!upstream) conclude(a, found);
}

template <class Kernel>
int launch(const Kernel& kernel, const Train& args, void* stream) {
  const Layout at(args.network, shared_bytes_cuda());
  if (const int error = GDBP_ALLOW_SHARED(kernel, shared_bytes_cuda())) return error;
  return GDBP_LAUNCH(kernel, unsigned(blocks_of(at, args.rows, args.most_blocks)), unsigned(at.warps * kWarp), at.bytes,
                     stream, args, at, tiles_of(at, args.rows));
}

}  // namespace

#ifdef GDBP_CUDASIM
int shared_bytes_cuda() { return int(cudasim::kMaxSharedBytes); }
#else
int shared_bytes_cuda() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes > 2048 ? bytes - 2048 : 0;  // what the kernels declare themselves
}
#endif

int train_cuda(const Train& args, void* stream) {
  if (args.rows == 0) return 0;
  return with_factors(args.network, [&](auto factors) {
    using Factor = typename decltype(factors)::type;
    return launch(train_kernel<Factor>, args, stream);
  });
}

}  // namespace gdbp::mlp
