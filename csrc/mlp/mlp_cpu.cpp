#include <algorithm>
#include <cstring>

#include "common/map_cpu.h"
#include "common/narrow_gemm_cpu.h"
#include "common/parallel.h"
#include "common/rows_cpu.h"
#include "dropout/dropout_math.h"
#include "mlp/mlp.h"

namespace gdbp::mlp {
namespace {

using cpu::kVectorBytes;
using cpu::padded;
using cpu::Right;

// Rows that go through all layers at a time: with 64 columns their activations fill a first-level cache.
constexpr int64_t kBlockRows = 128;
// Fewer operations are not worth a thread of their own, and with fewer rows adding the gradients up is
// no longer small beside computing them.
constexpr int64_t kGroupWork = 12'000'000, kGroupRows = 128;
// So few rows are not worth transposing the weights for.
constexpr int64_t kFewRows = 4;
// Enough groups for that many threads; more, up to the second, where each has many rows still.
constexpr int64_t kGroups = 16, kMostGroups = 64, kManyRows = 1024;

// Gradients that are added up at a time: their sums stay in a first-level cache.
constexpr int64_t kAddPiece = 2048;
// What an output costs besides its products, in operations: the activation and its derivative.
constexpr int64_t kOutputWork = 60;

// Float and double alone come here.
template <class F>
void dispatch_wide(Dtype dtype, const F& f) {
  if (dtype == Dtype::float64) {
    f(double{});
  } else {
    f(float{});
  }
}

// Hands out a workspace piece by piece, each at a line of the cache and with room behind it.
class Pieces {
 public:
  explicit Pieces(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t elements) {
    // Without a base the pieces are only counted.
    char* const at = base_ ? base_ + used_ : nullptr;
    used_ += (elements * int64_t(sizeof(T)) + 2 * kVectorBytes - 1) / kVectorBytes * kVectorBytes;
    return reinterpret_cast<T*>(at);
  }
  int64_t used() const { return used_; }

 private:
  char* const base_;
  int64_t used_ = 0;
};

int64_t widest(const Network& network) {
  int64_t width = 0;
  for (int l = 0; l < network.count; ++l) width = std::max<int64_t>(width, network.layers[l].outputs);
  return width;
}

// Weights as the products want them: transposed, the bias a row below.
template <class T>
struct Packed {
  T* weights[kMaxLayers];
  Pieces pieces;

  Packed(const Network& network, void* workspace) : pieces(workspace) {
    for (int l = 0; l < network.count; ++l)
      weights[l] = pieces.take<T>((network.layers[l].inputs + 1) * padded<T>(network.layers[l].outputs));
  }
  void pack(const Network& network) const {
    for (int l = 0; l < network.count; ++l) {
      const Layer& layer = network.layers[l];
      cpu::pack_transposed(static_cast<const T*>(layer.weight), layer.outputs, layer.inputs, layer.inputs, weights[l]);
      if (layer.bias) std::memcpy(bias(layer, l), layer.bias, size_t(layer.outputs) * sizeof(T));
    }
  }
  T* bias(const Layer& layer, int l) const { return weights[l] + layer.inputs * padded<T>(layer.outputs); }
};

// The last rows of a matrix (rows, cols) whose memory may end with it, copied to where there is room behind them.
template <class T>
Right<T> with_end(const T* data, int64_t rows, int64_t cols, T* copy) {
  const int64_t split = Right<T>::split_of(rows, cols);
  if (split == rows) return {data, cols};
  std::memcpy(copy, data + split * cols, size_t((rows - split) * cols) * sizeof(T));
  return {data, cols, copy, split};
}
template <class T>
int64_t end_elements(int64_t rows, int64_t cols) {
  return (rows - Right<T>::split_of(rows, cols)) * cols;
}

// What a group of rows needs for itself.
template <class T>
struct Scratch {
  T *slabs[2], *input;
  Pieces pieces;

  Scratch(const Network& network, void* base) : pieces(base) {
    for (T*& slab : slabs) slab = pieces.take<T>(kBlockRows * widest(network));
    input = pieces.take<T>(end_elements<T>(kBlockRows, network.inputs()));
  }
};

template <class T>
int64_t scratch_bytes(const Network& network) {
  return Scratch<T>(network, nullptr).pieces.used();
}

// Whether an output is better summed along the inputs, lane by lane, than beside others: there are too few of them to
// fill a vector.
template <class T>
bool has_few_outputs(const Layer& layer) {
  constexpr int64_t lanes = kVectorBytes / int64_t(sizeof(T)), to_fold = 8;  // what adding up the lanes takes
  return layer.outputs * (layer.inputs / lanes + to_fold) < layer.inputs;
}

// Of `count` elements, the first of which is number `first` of its layer. to may be from.
template <class T>
void drop(const Dropout& dropout, int64_t first, int64_t count, const T* from, T* to) {
  const auto mask = dropout::mask<T>(dropout.p, dropout.seed);
  cpu::loop([=](int64_t i) __attribute__((always_inline)) { to[i] = mask(from[i], first + i); }, 0, count);
}

template <class T>
void forward_block(const Forward& a, const Packed<T>& packed, const Scratch<T>& scratch, int64_t begin, int64_t rows) {
  const T* x = static_cast<const T*>(a.input) + begin * a.network.inputs();
  for (int l = 0; l < a.network.count; ++l) {
    const Layer& layer = a.network.layers[l];
    const auto of_block = [&](void* all) { return static_cast<T*>(all) + begin * layer.outputs; };
    T* const y = a.kept.outputs[l] ? of_block(a.kept.outputs[l]) : scratch.slabs[l % 2];
    T* const z = keeps_apart(layer, a.dropouts[l]) && a.kept.saved[l] ? of_block(a.kept.saved[l]) : y;
    if (a.rows < kFewRows || has_few_outputs<T>(layer)) {
      cpu::narrow_dots<T>(rows, layer.outputs, layer.inputs, x, static_cast<const T*>(layer.weight),
                          static_cast<const T*>(layer.bias), z);
    } else {
      cpu::narrow_gemm<T>({rows,
                           layer.outputs,
                           layer.inputs,
                           x,
                           layer.inputs,
                           1,
                           {packed.weights[l], padded<T>(layer.outputs)},
                           z,
                           layer.outputs,
                           layer.bias ? packed.bias(layer, l) : nullptr});
    }
    const int64_t elements = rows * layer.outputs;
    T* const activated = saves(layer.activation) == Saved::output ? z : y;
    if (layer.activation != Activation::none)
      cpu::activate<T>(layer.activation, {z, elements}, {activated, elements}, 1, elements);
    if (a.dropouts[l].p > 0) drop(a.dropouts[l], begin * layer.outputs, elements, activated, y);
    x = y;
  }
}

// Weights as the right side of a product.
template <class T>
struct Rights {
  Right<T> weights[kMaxLayers];
  Pieces pieces;

  Rights(const Network& network, void* workspace) : pieces(workspace) {
    for (int l = 0; l < network.count; ++l) {
      const auto& [weight, _, inputs, outputs, activation, weight_at, bias_at] = network.layers[l];
      T* const end = pieces.take<T>(end_elements<T>(outputs, inputs));
      if (end) weights[l] = with_end(static_cast<const T*>(weight), outputs, inputs, end);
    }
  }
};

// The gradient of a layer's product and bias, from that of its output. dz may be dy.
template <class T>
void backward_output(const Backward& a, int l, int64_t first, int64_t elements, const T* dy, T* dz) {
  const Layer& layer = a.network.layers[l];
  const Dropout& dropout = a.dropouts[l];
  const auto of_block = [&](const void* all) { return static_cast<const T*>(all) + first; };
  if (dropout.p > 0 && layer.activation == Activation::relu) {
    // What was dropped is 0, as what is not above it: that is seen faster than the mask is drawn again.
    const T* const y = of_block(a.kept.outputs[l]);
    const T scale = dropout::mask<T>(dropout.p).scale;
    cpu::loop([=](int64_t i) __attribute__((always_inline)) { dz[i] = Relu::backward(dy[i] * scale, y[i]); }, 0,
              elements);
    return;
  }
  if (dropout.p > 0) {
    drop(dropout, first, elements, dy, dz);
    dy = dz;
  }
  if (layer.activation != Activation::none) {
    const T* const saved = of_block((keeps_apart(layer, dropout) ? a.kept.saved : a.kept.outputs)[l]);
    cpu::activate_backward<T>(layer.activation, {dy, elements}, {saved, elements}, {dz, elements}, 1, elements);
  } else if (dz != dy) {
    std::memcpy(dz, dy, size_t(elements) * sizeof(T));
  }
}

// Adds the gradients of a block of rows to a group's sums, or for its first block leaves them there.
template <class T>
void backward_block(const Backward& a, const Rights<T>& rights, const Scratch<T>& scratch, int64_t begin, int64_t rows,
                    bool adds, T* sums) {
  static constexpr T one = 1;
  const Network& network = a.network;
  int first = 0;  // no gradient is wanted below it
  const auto is_trained = [](const Layer& layer) { return layer.weight_at >= 0 || layer.bias_at >= 0; };
  while (!a.grad_input && first < network.count && !is_trained(network.layers[first])) ++first;

  const T* dy = static_cast<const T*>(a.grad_output) + begin * network.outputs();
  for (int l = network.count - 1; l >= first; --l) {
    const Layer& layer = network.layers[l];
    const int64_t inputs = layer.inputs, outputs = layer.outputs;
    T* const dz = scratch.slabs[l % 2];
    backward_output(a, l, begin * outputs, rows * outputs, dy, dz);
    if (layer.weight_at >= 0) {
      const T* const x = static_cast<const T*>(l == 0 ? a.input : a.kept.outputs[l - 1]) + begin * inputs;
      const bool ends = l == 0 && (a.rows - begin - rows) * inputs * int64_t(sizeof(T)) < kVectorBytes;
      const Right<T> right = ends ? with_end(x, rows, inputs, scratch.input) : Right<T>{x, inputs};
      cpu::narrow_gemm<T>(
          {outputs, inputs, rows, dz, 1, outputs, right, sums + layer.weight_at, inputs, nullptr, adds});
    }
    if (layer.bias_at >= 0)
      cpu::narrow_gemm<T>({1, outputs, rows, &one, 0, 0, {dz, outputs}, sums + layer.bias_at, outputs, nullptr, adds});
    if (l == first && !a.grad_input) return;
    T* const dx = l > 0 ? scratch.slabs[(l - 1) % 2] : static_cast<T*>(a.grad_input) + begin * inputs;
    cpu::narrow_gemm<T>({rows, inputs, outputs, dz, outputs, 1, rights.weights[l], dx, inputs});
    dy = dx;
  }
}

// f(begin, rows) for the blocks of a group.
template <class F>
void for_blocks(int64_t group, int64_t groups, int64_t rows, const F& f) {
  const int64_t first = rows * group / groups, last = rows * (group + 1) / groups;
  for (int64_t begin = first; begin < last; begin += kBlockRows) f(begin, std::min(kBlockRows, last - begin));
}

// Adds what the other groups have to the first, in their order.
template <class T>
GDBP_CLONES void add_groups(T* sums, int64_t groups, int64_t stride, int64_t begin, int64_t end) {
  for (int64_t group = 1; group < groups; ++group) {
    const T* const more = sums + group * stride;
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) sums[i] += more[i];
  }
}

}  // namespace

int64_t groups_for(const Network& network, int64_t rows) {
  int64_t work = 0;  // for a row
  for (int l = 0; l < network.count; ++l)
    work += network.layers[l].outputs * (6 * int64_t(network.layers[l].inputs) + kOutputWork);
  const int64_t most = std::clamp(rows / kManyRows, kGroups, kMostGroups);
  return std::max<int64_t>(1, std::min({work * rows / kGroupWork, rows / kGroupRows, most}));
}

int64_t forward_bytes(const Network& network, int64_t rows) {
  int64_t bytes = 0;
  dispatch_wide(network.parameters, [&](auto zero) {
    using T = decltype(zero);
    bytes = Packed<T>(network, nullptr).pieces.used() + groups_for(network, rows) * scratch_bytes<T>(network);
  });
  return bytes;
}

int64_t backward_bytes(const Network& network, int64_t rows) {
  int64_t bytes = 0;
  dispatch_wide(network.parameters, [&](auto zero) {
    using T = decltype(zero);
    bytes = Rights<T>(network, nullptr).pieces.used() + groups_for(network, rows) * scratch_bytes<T>(network);
  });
  return bytes;
}

int forward_cpu(const Forward& a, void*) {
  dispatch_wide(a.network.parameters, [&](auto zero) {
    using T = decltype(zero);
    const Packed<T> packed(a.network, a.workspace);
    if (a.rows >= kFewRows) packed.pack(a.network);
    char* const scratches = static_cast<char*>(a.workspace) + packed.pieces.used();
    const int64_t groups = groups_for(a.network, a.rows);
    parallel_for(0, groups, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t group = lo; group < hi; ++group) {
        const Scratch<T> scratch(a.network, scratches + group * scratch_bytes<T>(a.network));
        for_blocks(group, groups, a.rows,
                   [&](int64_t begin, int64_t rows) { forward_block<T>(a, packed, scratch, begin, rows); });
      }
    });
  });
  return 0;
}

int backward_cpu(const Backward& a, void*) {
  dispatch_wide(a.network.parameters, [&](auto zero) {
    using T = decltype(zero);
    const Rights<T> rights(a.network, a.workspace);
    char* const scratches = static_cast<char*>(a.workspace) + rights.pieces.used();
    const int64_t groups = groups_for(a.network, a.rows);
    parallel_for(0, groups, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t group = lo; group < hi; ++group) {
        const Scratch<T> scratch(a.network, scratches + group * scratch_bytes<T>(a.network));
        T* const sums = static_cast<T*>(a.partials) + group * a.gradients;
        bool adds = false;
        for_blocks(group, groups, a.rows, [&](int64_t begin, int64_t rows) {
          backward_block<T>(a, rights, scratch, begin, rows, adds, sums);
          adds = true;
        });
        if (!adds) std::fill(sums, sums + a.gradients, T(0));
      }
    });
    const int64_t pieces = (a.gradients + kAddPiece - 1) / kAddPiece;
    parallel_for(0, groups > 1 ? pieces : 0, std::max<int64_t>(1, kGroups / groups), [&](int64_t lo, int64_t hi) {
      for (int64_t piece = lo; piece < hi; ++piece)
        add_groups(static_cast<T*>(a.partials), groups, a.gradients, piece * kAddPiece,
                   std::min(a.gradients, (piece + 1) * kAddPiece));
    });
  });
  return 0;
}

}  // namespace gdbp::mlp
