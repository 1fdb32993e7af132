// What lies where in a block's shared memory, and how many blocks there are.
#pragma once
#include "mlp/mlp.h"

namespace gdbp::mlp {

constexpr int kWarpRows = 16;  // of a tile, for each warp
constexpr int kMaxWarps = 8;

GDBP_HD constexpr int padded(int width) { return (width + 15) / 16 * 16; }
// Elements from row to row, of so many bytes each: 16 bytes more than a multiple of 32, so that rows that are read
// together lie in different banks.
GDBP_HD constexpr int stride_of(int width, int bytes) { return padded(width) + 16 / bytes; }

// Both take what lies in shared memory one behind the other, each at 16 bytes.
class Places {
 public:
  int bytes = 0;

 protected:
  GDBP_HD int take(int size) {
    const int at = bytes;
    bytes += (size + 15) / 16 * 16;
    return at;
  }
};

// To train, places in bytes; below 0 for none.
struct Layout : Places {
  int warps = 0;  // as many rows of a tile as they have together
  int weight[kMaxLayers], bias[kMaxLayers];
  // The input of each layer, and behind the last its output: (rows of a tile, width), padded.
  int input[kMaxLayers + 1];
  // Of each layer's output, where the derivative needs it: the pre-activation. The gradient of the pre-activation takes
  // the place of what it was computed from: this, or else the next layer's input.
  int pre[kMaxLayers];
  // Weight gradients so far, where there is room; else they are added up in the block's part of Train::partials.
  int sums[kMaxLayers];
  int bias_sums[kMaxLayers];  // of each warp

  GDBP_HD int gradient(int layer) const { return pre[layer] >= 0 ? pre[layer] : input[layer + 1]; }

  // As it is in `room` bytes; `warps` is 0 where it does not fit.
  Layout(const Network& network, int room) {
    for (int tried = kMaxWarps; tried > 1; --tried)
      if (place(network, tried, room)) return;
    warps = 0;
  }

 private:
  bool place(const Network& network, int tried, int room) {
    warps = tried;
    bytes = 0;
    const int rows = warps * kWarpRows, element = int(size_of(kept_in(network.factors)));
    const auto slab = [&](int width) { return take(rows * stride_of(width, element) * element); };
    for (int l = 0; l < network.count; ++l) {
      const Layer& layer = network.layers[l];
      weight[l] = take(padded(layer.outputs) * stride_of(layer.inputs, element) * element);
      bias[l] = take(padded(layer.outputs) * 4);
      input[l] = slab(layer.inputs);
      const bool last = l + 1 == network.count;
      pre[l] = !last && saves(layer.activation) == Saved::pre ? slab(layer.outputs) : -1;
      if (last) input[l + 1] = slab(layer.outputs);
      bias_sums[l] = layer.bias_at >= 0 ? take(warps * padded(layer.outputs) * 4) : -1;
    }
    for (int l = 0; l < network.count; ++l) {
      const Layer& layer = network.layers[l];
      const int size = padded(layer.outputs) * padded(layer.inputs) * 4;
      sums[l] = layer.weight_at >= 0 && bytes + size <= room ? take(size) : -1;
    }
    return bytes <= room;
  }
};

// To infer, where activations stay in registers. Rows of the input and of the output are read and written in pieces of
// 8 columns by four lanes, so both are padded to 32.
struct Parameters : Places {
  int weight[kMaxLayers], bias[kMaxLayers];

  // Columns and rows of a layer's weight.
  GDBP_HD static int depth(const Network& network, int l) {
    return l == 0 ? (network.inputs() + 31) / 32 * 32 : padded(network.layers[l].inputs);
  }
  GDBP_HD static int width(const Network& network, int l) {
    return l + 1 == network.count ? (network.outputs() + 31) / 32 * 32 : padded(network.layers[l].outputs);
  }
  // Elements from row to row. A quarter of a warp reads 16 bytes from each of 8 rows of 16-bit
  // elements; half of it, 32 bytes from each of 4 rows of floats: neither from a bank twice.
  GDBP_HD static constexpr int stride(int depth) { return depth + 8; }

  explicit Parameters(const Network& network) {
    const int element = int(size_of(kept_in(network.factors)));
    for (int l = 0; l < network.count; ++l) {
      weight[l] = take(width(network, l) * stride(depth(network, l)) * element);
      bias[l] = take(width(network, l) * 8);  // each pair of them twice
    }
  }
};

// Whether a block holds the network in so much shared memory.
inline bool fits(const Network& network, bool trains, int shared_bytes) {
  return trains ? Layout(network, shared_bytes).warps > 0 : Parameters(network).bytes <= shared_bytes;
}

inline int64_t tiles_of(const Layout& at, int64_t rows) {
  return (rows + at.warps * kWarpRows - 1) / (at.warps * kWarpRows);
}
inline int64_t blocks_of(const Layout& at, int64_t rows, int most) {
  const int64_t tiles = tiles_of(at, rows);
  return tiles < most ? tiles : most;
}
// How many blocks train_cuda launches.
inline int64_t blocks_for(const Network& network, int64_t rows, int shared_bytes) {
  return blocks_of(Layout(network, shared_bytes), rows, kMaxBlocks);
}

}  // namespace gdbp::mlp
