// Cross-entropy on CUDA. Every sum is taken in two stages over tiles of fixed size, without atomics, so it has the
// same bits in every run.
#include "common/reduce_cuda.cuh"
#include "loss/loss.h"
#include "loss/loss_math.h"

namespace gdbp::loss {
namespace {

using cuda::kThreads;
using cuda::load;
using cuda::store;

// How the rows lie, and who reads one: rows in one piece, in 16-byte accesses, by a team of `threads`; or rows across
// memory, whose neighbours lie side by side, by a thread each.
template <class T, int threads>
struct Pieces : cuda::Team<threads> {
  static constexpr int width = cuda::kWidth<T>;
  const Rows<T>& in;
  int64_t start;

  __device__ __forceinline__ Pieces(const Rows<T>& in, int64_t row) : in(in), start(row * in.classes) {}
  __device__ __forceinline__ int64_t at(int64_t j) const { return start + j; }
  __device__ __forceinline__ void read(const T* from, int64_t j, int count, Compute<T> (&to)[width]) const {
    load(from + start + j, count, aligned(from), to);
  }
  __device__ __forceinline__ void write(T* to, int64_t j, int count, const Compute<T> (&from)[width]) const {
    store(to + start + j, count, aligned(to), from);
  }
  __device__ __forceinline__ bool aligned(const T* data) const {
    return reinterpret_cast<uintptr_t>(data + start) % 16 == 0;
  }
};
template <class T>
struct Across : cuda::Team<1> {
  static constexpr int width = 1;
  const Rows<T>& in;
  int64_t start;

  __device__ __forceinline__ Across(const Rows<T>& in, int64_t row) : in(in), start(in.start(row)) {}
  __device__ __forceinline__ static int rank() { return 0; }
  __device__ __forceinline__ int64_t at(int64_t j) const { return start + j * in.inner; }
  __device__ __forceinline__ void read(const T* from, int64_t j, int, Compute<T> (&to)[1]) const {
    to[0] = cuda::widen_fast(from[at(j)]);
  }
  __device__ __forceinline__ void write(T* to, int64_t j, int, const Compute<T> (&from)[1]) const {
    to[at(j)] = cuda::narrow_fast<T>(from[0]);
  }
};

template <class T>
__device__ __forceinline__ Compute<T> logit(const Rows<T>& in, Compute<T> stored) {
  return in.softcap != 0 ? cap(stored, in.softcap) : stored;
}

// Calls f(j, count) for the classes of one row, Access::width neighbours at a time, shared out over the team.
template <class Access, class F>
__device__ __forceinline__ void for_each_class(int64_t classes, F f) {
  for (int64_t j = int64_t(Access::rank()) * Access::width; j < classes; j += Access::size * Access::width) {
    f(j, int(classes - j < Access::width ? classes - j : Access::width));
  }
}

// The sum of the class weights, which label smoothing spreads a row's target over.
template <class Access, class T>
__device__ __forceinline__ Compute<T> weight_sum(const Rows<T>& in) {
  using C = Compute<T>;
  if (in.weight == nullptr) return C(in.classes);
  C sum = 0;
  for (int64_t j = Access::rank(); j < in.classes; j += Access::size) sum += in.weight_of(j);
  return Access::reduce(sum, cuda::Sum{}, C(0));
}

template <class Access, class T>
__device__ __forceinline__ Softmax<Compute<T>> softmax_of(const Rows<T>& in, const Access& row) {
  using C = Compute<T>;
  constexpr int width = Access::width;
  C m = C(-INFINITY);
  for_each_class<Access>(in.classes, [&](int64_t j, int count) {
    C x[width];
    row.read(in.logits, j, count, x);
#pragma unroll
    for (int k = 0; k < width; ++k) m = k < count ? cuda::Max{}(m, logit(in, x[k])) : m;
  });
  m = Access::reduce(m, cuda::Max{}, C(-INFINITY));
  C others = C(0), largest = C(0);
  for_each_class<Access>(in.classes, [&](int64_t j, int count) {
    C x[width];
    row.read(in.logits, j, count, x);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (k >= count) continue;
      const C v = logit(in, x[k]);
      others += v == m ? C(0) : math::exp(v - m);
      largest += v == m ? C(1) : C(0);
    }
  });
  others = Access::reduce(others, cuda::Sum{}, C(0));
  largest = Access::reduce(largest, cuda::Sum{}, C(0));
  // m - m: NaN where there is no finite largest logit.
  return {m, others + (largest - C(1)) + (m - m)};
}

template <class T, class Access, bool soft>
__global__ void __launch_bounds__(kThreads)
    rows_forward_kernel(const Rows<T> in, Compute<T>* stats, double* losses, double* weights, T* output, int64_t* bad) {
  using C = Compute<T>;
  constexpr int width = Access::width;
  // The tile kernel, launched next, lowers it.
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    bad[0] = -1;
    bad[1] = 0;
  }
  const int64_t index = Access::row();
  if (index >= in.rows) return;
  const Access row(in, index);
  C loss = C(0), weight = C(0), kept[4] = {};
  if constexpr (soft) {
    const Softmax<C> softmax = softmax_of(in, row);
    const C log_total = softmax.log_total();
    C total = C(0), others = C(0);
    for_each_class<Access>(in.classes, [&](int64_t j, int count) {
      C x[width], t[width];
      row.read(in.logits, j, count, x);
      row.read(in.probabilities, j, count, t);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (k >= count) continue;
        const C v = logit(in, x[k]), a = in.weight_of(j + k) * (in.keep * t[k] + in.smooth);
        loss += soft_loss(a, v, softmax.m, log_total);
        total += a;
        others += v == softmax.m ? C(0) : a;
      }
    });
    loss = Access::reduce(loss, cuda::Sum{}, C(0));
    kept[0] = softmax.m;
    kept[1] = softmax.others;
    kept[2] = Access::reduce(total, cuda::Sum{}, C(0));
    kept[3] = Access::reduce(others, cuda::Sum{}, C(0));
    if (in.z != 0) loss += in.z * softmax.log_sum_exp() * softmax.log_sum_exp();
    weight = C(1);
  } else if (in.bad_label(index) != in.ignore_index) {
    kept[0] = kept[1] = loss = C(NAN);
  } else if (const Labels<C> labels(in, index); labels.counts()) {
    const Softmax<C> softmax = softmax_of(in, row);
    const auto nll = [&](int64_t label) {
      return softmax.nll(logit(in, C(cuda::widen_fast(in.logits[row.at(label)]))));
    };
    loss = labels.a * nll(labels.first);
    if (labels.second >= 0) loss += labels.b * nll(labels.second);
    if (labels.uniform != 0) {
      C distance = C(0);  // the sum of w_j (m - x_j): no term is negative, so none cancels
      for_each_class<Access>(in.classes, [&](int64_t j, int count) {
        C x[width];
        row.read(in.logits, j, count, x);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          if (k < count) distance += in.weight_of(j + k) * (softmax.m - logit(in, x[k]));
        }
      });
      distance = Access::reduce(distance, cuda::Sum{}, C(0));
      loss += labels.uniform * (weight_sum<Access>(in) * softmax.log_total() + distance);
    }
    if (in.z != 0) loss += in.z * labels.weight * softmax.log_sum_exp() * softmax.log_sum_exp();
    weight = labels.weight;
    kept[0] = softmax.m;
    kept[1] = softmax.others;
  }
  if (Access::rank() != 0) return;
  constexpr int count = soft ? 4 : 2;
#pragma unroll
  for (int k = 0; k < count; ++k) stats[count * index + k] = kept[k];
  losses[index] = double(loss);
  weights[index] = double(weight);
  if (output != nullptr) output[index] = cuda::narrow_fast<T>(loss);
}

template <class T>
struct Totals {
  T* output;  // null where every row has its own loss
  double* divisor;
  const double* normalizer;
  bool mean, empty_is_zero;

  __device__ void write(double loss, double weight) const {
    *divisor = normalizer != nullptr ? *normalizer : weight;
    if (output == nullptr) return;
    if (mean) loss = empty_is_zero && *divisor == 0 ? 0 : loss / *divisor;
    *output = cuda::narrow_fast<T>(Compute<T>(loss));
  }
};

template <class T>
__device__ void name_label(const Rows<T>& in, int64_t* bad) {
  if (bad[0] >= 0) bad[1] = in.bad_label(bad[0]);
}

// One block per tile of kRowTile rows. The sums of a tile replace its first row's; the only tile's are
// the totals.
template <class T>
__global__ void __launch_bounds__(kThreads)
    rows_tile_kernel(const Rows<T> in, double* losses, double* weights, int64_t* bad, Totals<T> totals) {
  static_assert(kRowTile == kThreads);
  const int64_t first = int64_t(blockIdx.x) * kRowTile;
  const int64_t row = first + threadIdx.x;
  double loss = 0, weight = 0;
  if (row < in.rows) {
    loss = losses[row];
    weight = weights[row];
    // As an unsigned number, the -1 of "none" is the largest.
    if (in.bad_label(row) != in.ignore_index) {
      atomicMin(reinterpret_cast<unsigned long long*>(bad), static_cast<unsigned long long>(row));
    }
  }
  loss = cuda::block_reduce<kThreads>(loss, cuda::Sum{}, 0.0);
  weight = cuda::block_reduce<kThreads>(weight, cuda::Sum{}, 0.0);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    totals.write(loss, weight);
    name_label(in, bad);
  } else {
    losses[first] = loss;
    weights[first] = weight;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    rows_total_kernel(const Rows<T> in, const double* losses, const double* weights, int64_t* bad, Totals<T> totals) {
  double loss = 0, weight = 0;
  for (int64_t row = threadIdx.x * kRowTile; row < in.rows; row += kThreads * kRowTile) {
    loss += losses[row];
    weight += weights[row];
  }
  loss = cuda::block_reduce<kThreads>(loss, cuda::Sum{}, 0.0);
  weight = cuda::block_reduce<kThreads>(weight, cuda::Sum{}, 0.0);
  if (threadIdx.x != 0) return;
  totals.write(loss, weight);
  if (in.rows == 0) {
    bad[0] = -1;
    bad[1] = 0;
  }
  name_label(in, bad);
}

template <class T, class Access, bool soft>
__global__ void __launch_bounds__(kThreads)
    rows_backward_kernel(const Rows<T> in, const Compute<T>* GDBP_RESTRICT stats, const double* divisor,
                         const T* GDBP_RESTRICT grad_output, Reduction reduction, T* grad_logits,
                         T* grad_probabilities) {
  using C = Compute<T>;
  constexpr int width = Access::width;
  const int64_t index = Access::row();
  if (index >= in.rows) return;
  const Access row(in, index);
  C scale = cuda::widen_fast(grad_output[reduction == Reduction::none ? index : 0]);
  if (reduction == Reduction::mean) scale = *divisor == 0 ? C(0) : C(double(scale) / *divisor);
  // The derivative of a capped logit, on top of what is upstream.
  const auto slope = [&](C stored) { return in.softcap != 0 ? cap_slope(stored, in.softcap) : C(1); };
  if constexpr (soft) {
    const Softmax<C> softmax{stats[4 * index], stats[4 * index + 1]};
    const SoftGradient<C> gradient(softmax, stats[4 * index + 2], stats[4 * index + 3], in.z, scale);
    const C log_total = softmax.log_total();
    for_each_class<Access>(in.classes, [&](int64_t j, int count) {
      C x[width], t[width], dx[width], dt[width];
      row.read(in.logits, j, count, x);
      row.read(in.probabilities, j, count, t);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (k >= count) continue;
        const C v = logit(in, x[k]), w = in.weight_of(j + k);
        dx[k] = slope(x[k]) * gradient(v, math::exp(v - softmax.m), w * (in.keep * t[k] + in.smooth));
        dt[k] = scale * in.keep * w * (log_total - (v - softmax.m));
      }
      if (grad_logits != nullptr) row.write(grad_logits, j, count, dx);
      if (grad_probabilities != nullptr) row.write(grad_probabilities, j, count, dt);
    });
  } else {
    const bool usable = in.bad_label(index) == in.ignore_index;
    Labels<C> labels;
    if (usable) labels = Labels<C>(in, index);
    const bool counts = labels.counts();
    const Softmax<C> softmax{counts ? stats[2 * index] : C(0), counts ? stats[2 * index + 1] : C(1)};
    const C all_weights = in.smooth != 0 && counts ? weight_sum<Access>(in) : C(0);
    const LabelGradient<C> gradient(softmax, labels, all_weights, in.z, scale);
    const C factor = gradient.factor();
    const C without_use = usable ? C(0) : C(NAN);
    for_each_class<Access>(in.classes, [&](int64_t j, int count) {
      C x[width], d[width];
      row.read(in.logits, j, count, x);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (k >= count || !counts) {
          d[k] = without_use;
          continue;
        }
        const C v = logit(in, x[k]);
        const int64_t label = j + k;
        if (label == labels.first) {
          d[k] = gradient.at_label(labels.a, labels.b, in.weight_of(label), v);
        } else if (label == labels.second) {
          d[k] = gradient.at_label(labels.b, labels.a, in.weight_of(label), v);
        } else {
          d[k] = math::exp(v - softmax.m) * factor;
          if (labels.uniform != 0) d[k] -= labels.uniform * in.weight_of(label);
          d[k] *= scale;
        }
        if (in.softcap != 0) d[k] *= slope(x[k]);
      }
      row.write(grad_logits, j, count, d);
    });
  }
}

// Short rows get a warp each: a block would idle at its barriers.
constexpr int64_t kWarpClasses = 1024;

// Calls f with the access that suits the rows, and whether their target is probabilities, as types.
template <class T, class F>
int dispatch_rows(const CrossEntropy& args, const F& f) {
  const auto with_access = [&](auto soft) {
    if (args.inner != 1) return f(Type<Across<T>>{}, soft);
    if (args.classes <= kWarpClasses) return f(Type<Pieces<T, cuda::kWarp>>{}, soft);
    return f(Type<Pieces<T, kThreads>>{}, soft);
  };
  return args.probabilities != nullptr ? with_access(std::true_type{}) : with_access(std::false_type{});
}

template <class T>
int forward(const CrossEntropyForward& args, void* stream) {
  const Rows<T> in(args);
  auto* const stats = static_cast<Compute<T>*>(args.stats);
  double* const losses = args.workspace;
  double* const weights = losses + in.rows;
  T* const output = static_cast<T*>(args.output);
  const bool each = args.reduction == Reduction::none;
  const Totals<T> totals{each ? nullptr : output, args.divisor, args.normalizer, args.reduction == Reduction::mean,
                         args.empty_is_zero};
  const unsigned row_tiles = unsigned(tiles(in.rows, kRowTile));
  if (row_tiles > 0) {
    int error = dispatch_rows<T>(args, [&](auto access, auto soft) {
      using Access = typename decltype(access)::type;
      const auto kernel = rows_forward_kernel<T, Access, decltype(soft)::value>;
      const unsigned blocks = unsigned(cuda::ceil_div(in.rows, Access::per_block));
      return GDBP_LAUNCH(kernel, blocks, kThreads, 0, stream, in, stats, losses, weights, each ? output : nullptr,
                         args.bad);
    });
    if (error != 0) return error;
    error = GDBP_LAUNCH(rows_tile_kernel<T>, row_tiles, kThreads, 0, stream, in, losses, weights, args.bad, totals);
    if (error != 0 || row_tiles == 1) return error;
  }
  return GDBP_LAUNCH(rows_total_kernel<T>, 1, kThreads, 0, stream, in, losses, weights, args.bad, totals);
}

template <class T>
int backward(const CrossEntropyBackward& args, void* stream) {
  const Rows<T> in(args);
  if (in.rows == 0 || in.classes == 0) return 0;
  return dispatch_rows<T>(args, [&](auto access, auto soft) {
    using Access = typename decltype(access)::type;
    const auto kernel = rows_backward_kernel<T, Access, decltype(soft)::value>;
    const unsigned blocks = unsigned(cuda::ceil_div(in.rows, Access::per_block));
    return GDBP_LAUNCH(kernel, blocks, kThreads, 0, stream, in, static_cast<const Compute<T>*>(args.stats),
                       args.divisor, static_cast<const T*>(args.grad_output), args.reduction,
                       static_cast<T*>(args.grad_logits), static_cast<T*>(args.grad_probabilities));
  });
}

}  // namespace

int cross_entropy_forward_cuda(const CrossEntropyForward& args, void* stream) {
  return dispatch(args.dtype, [&](auto tag) { return forward<typename decltype(tag)::type>(args, stream); });
}

int cross_entropy_backward_cuda(const CrossEntropyBackward& args, void* stream) {
  return dispatch(args.dtype, [&](auto tag) { return backward<typename decltype(tag)::type>(args, stream); });
}

}  // namespace gdbp::loss
