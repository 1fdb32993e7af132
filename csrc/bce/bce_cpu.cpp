#include "bce/bce.h"

#include <algorithm>

#include "bce/bce_math.h"
#include "common/macros.h"
#include "common/parallel.h"
#include "common/reduce_cpu.h"

namespace gdbp::bce {
namespace {

// Elements that are computed together, with their factors beside them in cache. Divides kTile.
constexpr int64_t kBlock = 512;

// The factors of the elements from `first` on, typed. Those that repeat within a block, or are all 1, are also spread
// out: a question whether there are any, inside a loop, would keep it from vectorising.
template <class T>
class Spread {
 public:
  using C = Compute<T>;
  explicit Spread(const Factors& factors) : data_(static_cast<const T*>(factors.data)), period_(factors.period) {
    std::fill_n(values_, kBlock, data_ ? C(widen(data_[0])) : C(1));
  }

  const C* at(int64_t first, int64_t n) {
    if (!data_ || period_ == 1) return values_;
    for (int64_t done = 0, from = first % period_; done < n; from = 0) {
      const int64_t count = std::min(n - done, period_ - from);
      for (int64_t i = 0; i < count; ++i) values_[done + i] = widen(data_[from + i]);
      done += count;
    }
    return values_;
  }

 private:
  const T* const data_;
  const int64_t period_;
  C values_[kBlock];
};

template <class T, class C, class To>
GDBP_CLONES void loss_block(const T* x, const T* t, const C* w, const C* q, To* to, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<To>(w[i] * loss<C>(Logit<C>(widen(x[i])), widen(t[i]), q[i]));
}

// Both, for an upstream gradient of 1; the values into a buffer, to be summed.
template <class T, class C>
GDBP_CLONES void both_block(const T* x, const T* t, const C* w, const C* q, C share, C* values, T* to, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const Logit<C> at(widen(x[i]));
    const C target = widen(t[i]);
    values[i] = w[i] * loss<C>(at, target, q[i]);
    to[i] = narrow<T>(share * (w[i] * input_slope<C>(at, target, q[i])));
  }
}

template <class T, class C>
GDBP_CLONES void input_block(const T* x, const T* t, const C* w, const C* q, const C* g, C share, T* to, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i)
    to[i] = narrow<T>(g[i] * share * (w[i] * input_slope<C>(Logit<C>(widen(x[i])), widen(t[i]), q[i])));
}

template <class T, class C>
GDBP_CLONES void target_block(const T* x, const C* w, const C* q, const C* g, C share, T* to, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i)
    to[i] = narrow<T>(g[i] * share * (w[i] * target_slope<C>(Logit<C>(widen(x[i])), q[i])));
}

// Calls f(tile, first, n, weights, pos_weights, upstream) for every block of every tile.
template <class T, class F>
void for_blocks(const Loss& a, const Factors& upstream, const F& f) {
  parallel_for(0, tiles(a.numel, kTile), 1, [&](int64_t lo, int64_t hi) {
    Spread<T> w(a.weight), q(a.pos_weight), g(upstream);
    for (int64_t tile = lo; tile < hi; ++tile) {
      const int64_t end = std::min(a.numel, (tile + 1) * kTile);
      for (int64_t first = tile * kTile; first < end; first += kBlock) {
        const int64_t n = std::min(kBlock, end - first);
        f(tile, first, n, w.at(first, n), q.at(first, n), g.at(first, n));
      }
    }
  });
}

// What an element's gradient is multiplied by for the mean.
template <class C>
C share_of(const Loss& a) {
  return a.reduction == Reduction::mean && a.numel > 0 ? C(1 / double(a.numel)) : C(1);
}

template <class T>
void forward(const Forward& a) {
  using C = Compute<T>;
  const T* const x = static_cast<const T*>(a.input);
  const T* const t = static_cast<const T*>(a.target);
  T* const output = static_cast<T*>(a.output);
  if (a.reduction == Reduction::none) {
    for_blocks<T>(a, {nullptr, 1}, [&](int64_t, int64_t first, int64_t n, const C* w, const C* q, const C*) {
      loss_block(x + first, t + first, w, q, output + first, n);
    });
    return;
  }
  double* const sums = static_cast<double*>(a.workspace);
  T* const grad = static_cast<T*>(a.grad_input);
  const C share = share_of<C>(a);
  std::fill_n(sums, tiles(a.numel, kTile), 0.0);
  for_blocks<T>(a, {nullptr, 1}, [&](int64_t tile, int64_t first, int64_t n, const C* w, const C* q, const C*) {
    C values[kBlock];
    if (grad) {
      both_block(x + first, t + first, w, q, share, values, grad + first, n);
    } else {
      loss_block(x + first, t + first, w, q, values, n);
    }
    const C* const from = values;
    sums[tile] += cpu::sum<double>([=](int64_t i) __attribute__((always_inline)) { return double(from[i]); }, 0, n);
  });
  double total = 0;
  for (int64_t tile = 0; tile < tiles(a.numel, kTile); ++tile) total += sums[tile];
  output[0] = narrow<T>(C(a.reduction == Reduction::mean ? total / double(a.numel) : total));
}

template <class T>
void backward(const Backward& a) {
  using C = Compute<T>;
  const T* const x = static_cast<const T*>(a.input);
  const T* const t = static_cast<const T*>(a.target);
  const T* const g = static_cast<const T*>(a.grad_output);
  T* const grad_input = static_cast<T*>(a.grad_input);
  T* const grad_target = static_cast<T*>(a.grad_target);
  const bool each = a.reduction == Reduction::none;
  const C share = share_of<C>(a);
  const Factors upstream{g, each ? std::max<int64_t>(1, a.numel) : 1};
  for_blocks<T>(a, upstream, [&](int64_t, int64_t first, int64_t n, const C* w, const C* q, const C* g) {
    if (grad_input) input_block(x + first, t + first, w, q, g, share, grad_input + first, n);
    if (grad_target) target_block(x + first, w, q, g, share, grad_target + first, n);
  });
}

}  // namespace

int forward_cpu(const Forward& a, void*) {
  dispatch(a.dtype, [&](auto type) { forward<typename decltype(type)::type>(a); });
  return 0;
}

int backward_cpu(const Backward& a, void*) {
  dispatch(a.dtype, [&](auto type) { backward<typename decltype(type)::type>(a); });
  return 0;
}

}  // namespace gdbp::bce
