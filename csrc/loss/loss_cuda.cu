// Cross-entropy with class indices on CUDA. Every sum is taken in two stages over
// tiles of fixed size, without atomics, so it has the same bits in every run.
#include "common/reduce_cuda.cuh"
#include "loss/loss.h"
#include "loss/loss_math.h"

namespace gdbp::loss {
namespace {

using cuda::kThreads;
using cuda::load;
using cuda::store;

// What a kernel needs to know of the rows. C is the compute type.
template <class T>
struct Rows {
  using C = Compute<T>;
  int64_t rows, classes;
  const T* logits;
  const int64_t* target;
  const T* weight;
  int64_t ignore_index;
  C keep, smooth;  // 1 - label_smoothing, label_smoothing / classes

  explicit Rows(const CrossEntropy& args)
      : rows(args.rows),
        classes(args.classes),
        logits(static_cast<const T*>(args.logits)),
        target(args.target),
        weight(static_cast<const T*>(args.weight)),
        ignore_index(args.ignore_index),
        keep(C(1 - args.label_smoothing)),
        smooth(args.label_smoothing > 0 ? C(args.label_smoothing / double(args.classes)) : C(0)) {}

  __device__ __forceinline__ C weight_of(int64_t label) const {
    return weight != nullptr ? cuda::widen_fast(weight[label]) : C(1);
  }
  __device__ __forceinline__ bool ignored(int64_t row) const { return target[row] == ignore_index; }
  __device__ __forceinline__ bool in_range(int64_t label) const { return label >= 0 && label < classes; }
};

// Calls f(j, x, count) for the classes of one row, kWidth neighbours at a time, shared out over the team.
template <class Team, class T, class F>
__device__ __forceinline__ void for_each_class(const T* row, int64_t classes, F f) {
  constexpr int width = cuda::kWidth<T>;
  const bool vectors = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  for (int64_t j = int64_t(Team::rank()) * width; j < classes; j += Team::size * width) {
    const int count = int(classes - j < width ? classes - j : width);
    Compute<T> x[width];
    load(row + j, count, vectors, x);
    f(j, x, count);
  }
}

// The sum of the class weights, which label smoothing spreads a row's target over.
template <class Team, class T>
__device__ __forceinline__ Compute<T> weight_sum(const Rows<T>& in) {
  using C = Compute<T>;
  if (in.weight == nullptr) return C(in.classes);
  C sum = 0;
  // Beyond `count` there are zeros.
  for_each_class<Team>(in.weight, in.classes, [&](int64_t, const auto& w, int) {
#pragma unroll
    for (int k = 0; k < cuda::kWidth<T>; ++k) sum += w[k];
  });
  return Team::reduce(sum, cuda::Sum{}, C(0));
}

template <class T, int threads>
__global__ void __launch_bounds__(kThreads) rows_forward_kernel(const Rows<T> in, Compute<T>* stats, double* losses,
                                                                double* weights, T* output, int64_t* bad_row) {
  using C = Compute<T>;
  using Team = cuda::Team<threads>;
  constexpr int width = cuda::kWidth<T>;
  // The tile kernel, launched next, lowers it.
  if (blockIdx.x == 0 && threadIdx.x == 0) *bad_row = -1;
  const int64_t row = Team::row();
  if (row >= in.rows) return;
  const int64_t label = in.target[row];
  const bool ignored = in.ignored(row);
  const bool leader = Team::rank() == 0;
  C m = C(0), others = C(0), loss = C(0), weight = C(0);
  if (!ignored && !in.in_range(label)) {
    m = others = loss = C(NAN);
  } else if (!ignored) {
    const T* const x = in.logits + row * in.classes;
    m = C(-INFINITY);
    for_each_class<Team>(x, in.classes, [&](int64_t, const C(&v)[width], int count) {
#pragma unroll
      for (int k = 0; k < width; ++k) m = k < count ? cuda::Max{}(m, v[k]) : m;
    });
    m = Team::reduce(m, cuda::Max{}, C(-INFINITY));
    C distance = C(0);  // the sum of w_j (m - x_j): no term is negative, so none cancels
    for_each_class<Team>(x, in.classes, [&](int64_t j, const C(&v)[width], int count) {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (k >= count) continue;
        others += j + k != label ? math::exp(v[k] - m) : C(0);
        if (in.smooth != 0) distance += in.weight_of(j + k) * (m - v[k]);
      }
    });
    others = Team::reduce(others, cuda::Sum{}, C(0));
    const Row<C> stat(m, cuda::widen_fast(x[label]), others);
    weight = in.weight_of(label);
    loss = in.keep * weight * stat.nll();
    if (in.smooth != 0) {
      const C log_total = stat.own > others ? math::log1p(others) : math::log(stat.total());
      distance = Team::reduce(distance, cuda::Sum{}, C(0));
      loss += in.smooth * (weight_sum<Team>(in) * log_total + distance);
    }
  }
  if (!leader) return;
  stats[2 * row] = m;
  stats[2 * row + 1] = others;
  losses[row] = double(loss);
  weights[row] = double(weight);
  if (output != nullptr) output[row] = cuda::narrow_fast<T>(loss);
}

template <class T>
struct Totals {
  T* output;  // null where every row has its own loss
  double* weight;
  bool mean;

  __device__ void write(double loss, double divisor) const {
    *weight = divisor;
    if (output != nullptr) *output = cuda::narrow_fast<T>(Compute<T>(mean ? loss / divisor : loss));
  }
};

// One block per tile of kRowTile rows. The sums of a tile replace its first row's; the only tile's are
// the totals.
template <class T>
__global__ void __launch_bounds__(kThreads)
    rows_tile_kernel(const Rows<T> in, double* losses, double* weights, int64_t* bad_row, Totals<T> totals) {
  static_assert(kRowTile == kThreads);
  const int64_t first = int64_t(blockIdx.x) * kRowTile;
  const int64_t row = first + threadIdx.x;
  double loss = 0, weight = 0;
  if (row < in.rows) {
    loss = losses[row];
    weight = weights[row];
    // As an unsigned number, the -1 of "none" is the largest.
    if (!in.ignored(row) && !in.in_range(in.target[row])) {
      atomicMin(reinterpret_cast<unsigned long long*>(bad_row), static_cast<unsigned long long>(row));
    }
  }
  loss = cuda::block_reduce<kThreads>(loss, cuda::Sum{}, 0.0);
  weight = cuda::block_reduce<kThreads>(weight, cuda::Sum{}, 0.0);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    totals.write(loss, weight);
  } else {
    losses[first] = loss;
    weights[first] = weight;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    rows_total_kernel(int64_t rows, const double* losses, const double* weights, int64_t* bad_row, Totals<T> totals) {
  double loss = 0, weight = 0;
  for (int64_t row = threadIdx.x * kRowTile; row < rows; row += kThreads * kRowTile) {
    loss += losses[row];
    weight += weights[row];
  }
  loss = cuda::block_reduce<kThreads>(loss, cuda::Sum{}, 0.0);
  weight = cuda::block_reduce<kThreads>(weight, cuda::Sum{}, 0.0);
  if (threadIdx.x != 0) return;
  totals.write(loss, weight);
  if (rows == 0) *bad_row = -1;
}

template <class T, int threads>
__global__ void __launch_bounds__(kThreads)
    rows_backward_kernel(const Rows<T> in, const Compute<T>* GDBP_RESTRICT stats, const double* total_weight,
                         const T* GDBP_RESTRICT grad_output, Reduction reduction, T* grad_logits) {
  using C = Compute<T>;
  using Team = cuda::Team<threads>;
  constexpr int width = cuda::kWidth<T>;
  const int64_t row = Team::row();
  if (row >= in.rows) return;
  const int64_t label = in.target[row];
  const bool ignored = in.ignored(row);
  const bool usable = !ignored && in.in_range(label);
  const T* const x = in.logits + row * in.classes;
  T* const dx = grad_logits + row * in.classes;
  const C x_label = usable ? cuda::widen_fast(x[label]) : C(0);
  // grad_logits may be the logits: all must have read the target's before anyone overwrites it.
  Team::sync();

  C coefficient = cuda::widen_fast(grad_output[reduction == Reduction::none ? row : 0]);
  if (reduction == Reduction::mean) {
    coefficient = *total_weight == 0 ? C(0) : coefficient / C(*total_weight);
  }
  const Row<C> stat(usable ? stats[2 * row] : C(0), x_label, usable ? stats[2 * row + 1] : C(1));
  const C hard = usable ? in.keep * in.weight_of(label) : C(0);
  const C soft = in.smooth != 0 && usable ? in.smooth * weight_sum<Team>(in) : C(0);
  const C inverse = C(1) / stat.total();
  const C without_use = ignored ? C(0) : C(NAN);
  const bool vectors = reinterpret_cast<uintptr_t>(dx) % 16 == 0;
  for_each_class<Team>(x, in.classes, [&](int64_t j, const C(&v)[width], int count) {
    C d[width];
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (k >= count || !usable) {
        d[k] = without_use;
        continue;
      }
      const C p = (j + k == label ? stat.own : math::exp(v[k] - stat.m)) * inverse;
      d[k] = hard * (j + k == label ? -stat.others * inverse : p);
      if (in.smooth != 0) d[k] += p * soft - in.smooth * in.weight_of(j + k);
      d[k] *= coefficient;
    }
    store(dx + j, count, vectors, d);
  });
}

// Short rows get a warp each: a block would idle at its barriers.
constexpr int64_t kWarpClasses = 1024;
template <int threads>
unsigned row_blocks(int64_t rows) {
  return unsigned(cuda::ceil_div(rows, cuda::Team<threads>::per_block));
}

template <class T>
int forward(const CrossEntropyForward& args, void* stream) {
  const Rows<T> in(args);
  auto* const stats = static_cast<Compute<T>*>(args.stats);
  double* const losses = static_cast<double*>(args.workspace);
  double* const weights = losses + args.rows;
  T* const output = static_cast<T*>(args.output);
  const bool each = args.reduction == Reduction::none;
  const Totals<T> totals{each ? nullptr : output, static_cast<double*>(args.total_weight),
                         args.reduction == Reduction::mean};
  const unsigned row_tiles = unsigned(tiles(args.rows, kRowTile));
  if (row_tiles > 0) {
    const bool warps = args.classes <= kWarpClasses;
    const auto kernel = warps ? rows_forward_kernel<T, cuda::kWarp> : rows_forward_kernel<T, kThreads>;
    const unsigned blocks = warps ? row_blocks<cuda::kWarp>(args.rows) : row_blocks<kThreads>(args.rows);
    int error = GDBP_LAUNCH(kernel, blocks, kThreads, 0, stream, in, stats, losses, weights, each ? output : nullptr,
                            args.bad_row);
    if (error != 0) return error;
    error = GDBP_LAUNCH(rows_tile_kernel<T>, row_tiles, kThreads, 0, stream, in, losses, weights, args.bad_row, totals);
    if (error != 0 || row_tiles == 1) return error;
  }
  return GDBP_LAUNCH(rows_total_kernel<T>, 1, kThreads, 0, stream, args.rows, losses, weights, args.bad_row, totals);
}

template <class T>
int backward(const CrossEntropyBackward& args, void* stream) {
  if (args.rows == 0 || args.classes == 0) return 0;
  const bool warps = args.classes <= kWarpClasses;
  const auto kernel = warps ? rows_backward_kernel<T, cuda::kWarp> : rows_backward_kernel<T, kThreads>;
  const unsigned blocks = warps ? row_blocks<cuda::kWarp>(args.rows) : row_blocks<kThreads>(args.rows);
  return GDBP_LAUNCH(kernel, blocks, kThreads, 0, stream, Rows<T>(args), static_cast<const Compute<T>*>(args.stats),
                     static_cast<const double*>(args.total_weight), static_cast<const T*>(args.grad_output),
                     args.reduction, static_cast<T*>(args.grad_logits));
}

}  // namespace

int cross_entropy_forward_cuda(const CrossEntropyForward& args, void* stream) {
  return dispatch(args.dtype, [&](auto tag) { return forward<typename decltype(tag)::type>(args, stream); });
}

int cross_entropy_backward_cuda(const CrossEntropyBackward& args, void* stream) {
  return dispatch(args.dtype, [&](auto tag) { return backward<typename decltype(tag)::type>(args, stream); });
}

}  // namespace gdbp::loss
