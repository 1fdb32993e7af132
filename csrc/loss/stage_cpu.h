// Rows that do not lie in one piece, or whose logits are capped: a few at a time, in cache, in the compute type.
#pragma once
#include <algorithm>
#include <vector>

#include "common/macros.h"
#include "loss/loss_math.h"

namespace gdbp::loss {

template <class T>
class Stage {
 public:
  using C = Compute<T>;
  static bool needed(const CrossEntropy& a) { return a.inner != 1 || a.softcap != 0; }

  // grad, grad_t: where the gradients of logits and probabilities go, or null.
  explicit Stage(const CrossEntropy& a, T* grad = nullptr, T* grad_t = nullptr) : in_(a), grad_(grad), grad_t_(grad_t) {
    const int64_t size = kRows * in_.classes;
    for (auto [buffer, used] : {std::pair{&x_, true}, std::pair{&t_, in_.probabilities != nullptr},
                                std::pair{&g_, grad != nullptr}, std::pair{&g_t_, grad_t != nullptr}})
      if (used) buffer->resize(size);
  }

  // Calls f(row, x, t, grad, grad_t) for the rows [lo, hi), with null for what there is not.
  template <class F>
  void for_rows(int64_t lo, int64_t hi, const F& f) {
    const int64_t n = in_.classes;
    while (lo < hi) {
      // Neighbours in memory, so that a line of cache is read once for all of them.
      const int64_t count = std::min({kRows, hi - lo, in_.inner - lo % in_.inner});
      const int64_t start = in_.start(lo);
      gather(in_.logits + start, count, x_.data());
      if (in_.softcap != 0) cap_all(x_.data(), in_.softcap, count * n);
      if (in_.probabilities) gather(in_.probabilities + start, count, t_.data());
      const auto row_of = [n](std::vector<C>& buffer, int64_t i) { return buffer.empty() ? nullptr : &buffer[i * n]; };
      for (int64_t i = 0; i < count; ++i) f(lo + i, row_of(x_, i), row_of(t_, i), row_of(g_, i), row_of(g_t_, i));
      if (grad_) {
        if (in_.softcap != 0) slope_all(in_.logits + start, count);
        scatter(g_.data(), count, grad_ + start);
      }
      if (grad_t_) scatter(g_t_.data(), count, grad_t_ + start);
      lo += count;
    }
  }

 private:
  // Rows that are staged together: as many floats as a line of cache holds.
  static constexpr int64_t kRows = 16;

  GDBP_CLONES void gather(const T* from, int64_t count, C* to) const {
    const int64_t n = in_.classes, stride = in_.inner;
    if (count == kRows) {
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < kRows; ++i) to[i * n + j] = widen(from[j * stride + i]);
    } else {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < n; ++j) to[i * n + j] = widen(from[j * stride + i]);
    }
  }
  GDBP_CLONES void scatter(const C* from, int64_t count, T* to) const {
    const int64_t n = in_.classes, stride = in_.inner;
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < count; ++i) to[j * stride + i] = narrow<T>(from[i * n + j]);
  }
  GDBP_CLONES static void cap_all(C* x, C softcap, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = cap(x[i], softcap);
  }
  // Where there is no gradient the logits may hold anything: the row may be ignored.
  GDBP_CLONES static void slopes(const C* x, C* grad, C softcap, int64_t n) {
    for (int64_t i = 0; i < n; ++i) grad[i] = grad[i] == C(0) ? C(0) : grad[i] * cap_slope(x[i], softcap);
  }
  // The logits once more as they are, for those in x_ are capped.
  void slope_all(const T* logits, int64_t count) {
    gather(logits, count, x_.data());
    slopes(x_.data(), g_.data(), in_.softcap, count * in_.classes);
  }

  const Rows<T> in_;
  T* const grad_;
  T* const grad_t_;
  std::vector<C> x_, t_, g_, g_t_;
};

}  // namespace gdbp::loss
