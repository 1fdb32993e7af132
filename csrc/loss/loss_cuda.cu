// Cross-entropy on CUDA. The rows are weighed first, so that the pass over the logits knows the divisor of a mean and
// can write their gradient. Every sum is taken in two stages over tiles of fixed size, without atomics, so it has the
// same bits in every run.
#include "loss/label_cuda.cuh"
#include "loss/rows_cuda.cuh"

namespace gdbp::loss {
namespace {

using cuda::kThreads;

constexpr int64_t kNoRow = INT64_MAX;
// Of the kernels that add up the rows of a tile: a few rows a thread, for each costs it the way to memory.
constexpr int kTileThreads = 1024;

// What is known of the rows before any logit is read.
struct Weighed {
  double weight;
  int64_t bad;  // the first row with a label out of range, else kNoRow

  template <class T>
  __device__ __forceinline__ static Weighed of(const Rows<T>& in, int64_t row) {
    if (in.target == nullptr) return {1, kNoRow};
    if (in.bad_label(row) != in.ignore_index) return {0, row};
    return {double(Labels<Compute<T>>(in, row).weight), kNoRow};
  }
  __device__ __forceinline__ void add(const Weighed& other) {
    weight += other.weight;
    bad = cuda::Min{}(bad, other.bad);
  }
  template <int threads>
  __device__ __forceinline__ Weighed reduced() const {
    return {cuda::block_reduce<threads>(weight, cuda::Sum{}, 0.0),
            cuda::block_reduce<threads>(bad, cuda::Min{}, kNoRow)};
  }
};

// Where totals go, and how.
template <class T>
struct Totals {
  T* output;  // null where every row has its own loss
  double* divisor;
  const double* normalizer;
  bool mean, empty_is_zero;
  int64_t* bad;

  __device__ void write_divisor(const Weighed& total) const {
    *divisor = normalizer != nullptr ? *normalizer : total.weight;
  }
  __device__ void tell(const Rows<T>& in, const Weighed& total) const {
    const bool is_bad = total.bad != kNoRow;
    tell_label(bad, is_bad ? total.bad : -1, is_bad ? in.bad_label(total.bad) : 0);
  }
  __device__ void write(const Rows<T>& in, const Weighed& total) const {
    write_divisor(total);
    tell(in, total);
  }
  __device__ void write(double loss) const {
    if (output == nullptr) return;
    if (mean) loss = empty_is_zero && *divisor == 0 ? 0 : loss / *divisor;
    *output = cuda::narrow_fast<T>(Compute<T>(loss));
  }
  // What an upstream gradient of the loss is multiplied by.
  __device__ double factor() const { return !mean ? 1 : *divisor == 0 ? 0 : 1 / *divisor; }
};

// One block per tile of kRowTile rows; the only tile's sum is the total.
template <class T>
__global__ void __launch_bounds__(kTileThreads) weigh_kernel(const Rows<T> in, Weighed* tiles, Totals<T> totals) {
  const int64_t first = int64_t(blockIdx.x) * kRowTile, end = first + kRowTile < in.rows ? first + kRowTile : in.rows;
  Weighed sum{0, kNoRow};
#pragma unroll 4
  for (int64_t row = first + threadIdx.x; row < end; row += kTileThreads) sum.add(Weighed::of(in, row));
  sum = sum.reduced<kTileThreads>();
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    totals.write(in, sum);
  } else {
    tiles[blockIdx.x] = sum;
  }
}
template <class T>
__global__ void __launch_bounds__(kThreads)
    total_weight_kernel(const Rows<T> in, int64_t count, const Weighed* tiles, Totals<T> totals) {
  Weighed sum{0, kNoRow};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum.add(tiles[i]);
  sum = sum.reduced<kThreads>();
  if (threadIdx.x == 0) totals.write(in, sum);
}

// The same of the losses. A tile's sum replaces its first row's.
template <class T>
__global__ void __launch_bounds__(kTileThreads) total_loss_kernel(int64_t rows, double* losses, Totals<T> totals) {
  const int64_t first = int64_t(blockIdx.x) * kRowTile, end = first + kRowTile < rows ? first + kRowTile : rows;
  double sum = 0;
#pragma unroll 4
  for (int64_t row = first + threadIdx.x; row < end; row += kTileThreads) sum += losses[row];
  sum = cuda::block_reduce<kTileThreads>(sum, cuda::Sum{}, 0.0);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    totals.write(sum);
  } else {
    losses[first] = sum;
  }
}
template <class T>
__global__ void __launch_bounds__(kThreads)
    total_of_tiles_kernel(int64_t rows, const double* losses, Totals<T> totals) {
  double sum = 0;
  for (int64_t row = threadIdx.x * kRowTile; row < rows; row += kThreads * kRowTile) sum += losses[row];
  sum = cuda::block_reduce<kThreads>(sum, cuda::Sum{}, 0.0);
  if (threadIdx.x == 0) totals.write(sum);
}

// Of a multiprocessor's, so that a thread has 64 registers.
constexpr int kThreadsAtOnce = 1024;

// What a team finds out about its row, and where it is asked for the gradient at an upstream gradient of 1.
template <class T, class Access, bool soft>
__device__ __forceinline__ Compute<T> forward_row(const Rows<T>& in, int64_t index, const Totals<T>& totals,
                                                  Compute<T>* stats, T* each, T* grad_logits) {
  using C = Compute<T>;
  Row<T, Access, soft> row(in, index);
  const C loss = row.loss();
  if (grad_logits != nullptr) row.write_gradient(C(totals.factor()), grad_logits, nullptr);
  if (Access::rank() != 0) return loss;
#pragma unroll
  for (int k = 0; k < row.kept; ++k) stats[row.kept * index + k] = row.stats[k];
  if (each != nullptr) each[index] = cuda::narrow_fast<T>(loss);
  return loss;
}

template <class T, class Access, bool soft>
__global__ void __launch_bounds__(Access::block, kThreadsAtOnce / Access::block)
    rows_forward_kernel(const Rows<T> in, Totals<T> totals, Compute<T>* stats, double* losses, T* each,
                        T* grad_logits) {
  const int64_t index = Access::row();
  if (index >= in.rows) return;
  const Compute<T> loss = forward_row<T, Access, soft>(in, index, totals, stats, each, grad_logits);
  if (Access::rank() == 0) losses[index] = double(loss);
}

// Everything at once, of short rows that are no more than the threads of a block.
template <class T, bool soft>
__global__ void __launch_bounds__(kThreads)
    few_rows_kernel(const Rows<T> in, Totals<T> totals, Compute<T>* stats, T* each, T* grad_logits) {
  const int64_t index = threadIdx.x;
  const bool is_there = index < in.rows;
  const Weighed own = is_there ? Weighed::of(in, index) : Weighed{0, kNoRow}, total = own.reduced<kThreads>();
  if (threadIdx.x == 0) totals.write_divisor(total);
  __syncthreads();
  double loss = is_there ? double(forward_row<T, Across<T>, soft>(in, index, totals, stats, each, grad_logits)) : 0;
  loss = cuda::block_reduce<kThreads>(loss, cuda::Sum{}, 0.0);
  if (threadIdx.x != 0) return;
  totals.write(loss);
  // At the end, as the host may be far.
  totals.tell(in, total);
}

// unless_one: not where the upstream gradient is 1, for which the forward pass has written the gradient.
template <class T, class Access, bool soft>
__global__ void __launch_bounds__(Access::block, kThreadsAtOnce / Access::block)
    rows_backward_kernel(const Rows<T> in, const Compute<T>* GDBP_RESTRICT stats, const double* divisor,
                         const T* GDBP_RESTRICT grad_output, Reduction reduction, bool unless_one, T* grad_logits,
                         T* grad_probabilities) {
  using C = Compute<T>;
  if (unless_one && cuda::widen_fast(*grad_output) == C(1)) return;
  for (int64_t index = Access::row(); index < in.rows; index += int64_t(gridDim.x) * Access::per_block) {
    C scale = cuda::widen_fast(grad_output[reduction == Reduction::none ? index : 0]);
    if (reduction == Reduction::mean) scale = *divisor == 0 ? C(0) : C(double(scale) / *divisor);
    Row<T, Access, soft> row(in, index);
#pragma unroll
    for (int k = 0; k < row.kept; ++k) row.stats[k] = stats[row.kept * index + k];
    row.write_gradient(scale, grad_logits, grad_probabilities);
  }
}

// Up to so many classes a row is a warp's: more threads would idle at their barriers.
constexpr int64_t kWarpClasses = 1024;
// A row is read once more for its gradient. Of larger ones a multiprocessor takes one at a time, so that all that are
// under way stay in the L2 cache.
constexpr int64_t kLargeRow = 128 * 1024;

// Calls f with the access that suits the rows, and whether their target is probabilities, as types.
template <class T, class F>
int dispatch_rows(const CrossEntropy& args, const F& f) {
  const auto with_access = [&](auto soft) {
    if (args.inner != 1) return f(Type<Across<T>>{}, soft);
    if (args.classes <= kWarpClasses) return f(Type<Pieces<T, cuda::kWarp>>{}, soft);
    if (args.classes * int64_t(sizeof(T)) <= kLargeRow) return f(Type<Pieces<T, 512>>{}, soft);
    return f(Type<Pieces<T, 1024>>{}, soft);
  };
  return args.probabilities != nullptr ? with_access(std::true_type{}) : with_access(std::false_type{});
}

constexpr int64_t kFewClasses = 32;

template <class T>
int forward(const CrossEntropyForward& args, void* stream) {
  const Rows<T> in(args);
  auto* const stats = static_cast<Compute<T>*>(args.stats);
  T* const output = static_cast<T*>(args.output);
  T* const grad_logits = static_cast<T*>(args.grad_logits);
  const bool is_each = args.reduction == Reduction::none;
  T* const each = is_each ? output : nullptr;
  const Totals<T> totals{is_each ? nullptr : output,        args.divisor,       args.normalizer,
                         args.reduction == Reduction::mean, args.empty_is_zero, args.bad};
  if (in.rows <= kThreads && in.classes <= kFewClasses) {
    const auto kernel = args.probabilities != nullptr ? few_rows_kernel<T, true> : few_rows_kernel<T, false>;
    return GDBP_LAUNCH(kernel, 1, kThreads, 0, stream, in, totals, stats, each, grad_logits);
  }
  const int64_t count = tiles(in.rows, kRowTile);
  double* const losses = args.workspace;
  auto* const weighed = reinterpret_cast<Weighed*>(losses + in.rows);
  int error =
      GDBP_LAUNCH(weigh_kernel<T>, unsigned(count > 0 ? count : 1), kTileThreads, 0, stream, in, weighed, totals);
  if (error == 0 && count > 1)
    error = GDBP_LAUNCH(total_weight_kernel<T>, 1, kThreads, 0, stream, in, count, weighed, totals);
  if (error != 0) return error;
  if (count > 0) {
    error = dispatch_rows<T>(args, [&](auto access, auto soft) {
      using Access = typename decltype(access)::type;
      const auto kernel = rows_forward_kernel<T, Access, decltype(soft)::value>;
      const unsigned blocks = unsigned(cuda::ceil_div(in.rows, Access::per_block));
      return GDBP_LAUNCH(kernel, blocks, Access::block, 0, stream, in, totals, stats, losses, each, grad_logits);
    });
    if (error != 0) return error;
  }
  if (is_each) return 0;
  error = GDBP_LAUNCH(total_loss_kernel<T>, unsigned(count > 0 ? count : 1), kTileThreads, 0, stream, in.rows, losses,
                      totals);
  if (error != 0 || count <= 1) return error;
  return GDBP_LAUNCH(total_of_tiles_kernel<T>, 1, kThreads, 0, stream, in.rows, losses, totals);
}

template <class T>
int backward(const CrossEntropyBackward& args, void* stream) {
  const Rows<T> in(args);
  if (in.rows == 0 || in.classes == 0) return 0;
  return dispatch_rows<T>(args, [&](auto access, auto soft) {
    using Access = typename decltype(access)::type;
    const auto kernel = rows_backward_kernel<T, Access, decltype(soft)::value>;
    const int64_t blocks = cuda::ceil_div(in.rows, Access::per_block);
    const unsigned grid = unsigned(args.unless_one && blocks > cuda::kFewBlocks ? cuda::kFewBlocks : blocks);
    return GDBP_LAUNCH(kernel, grid, Access::block, 0, stream, in, static_cast<const Compute<T>*>(args.stats),
                       args.divisor, static_cast<const T*>(args.grad_output), args.reduction, args.unless_one,
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
