// Rows that lie in one piece, a part after the other: the loops over a part, and the exponentials of a row.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/macros.h"
#include "loss/loss_math.h"

namespace gdbp::loss {

// The loops over a piece of a row. X is what the row is stored as, C what it is computed in.

template <class X, class C>
GDBP_CLONES void widen_all(const X* x, C* to, int64_t n) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) to[j] = widen(x[j]);
}

// The largest logit, and where one of them lies; -1 where there is none above -infinity.
template <class C>
struct Largest {
  C m = -std::numeric_limits<C>::infinity();
  int64_t place = -1;
};

// Takes in x, of which the first is element `first` of the row. Many lanes: a maximum has to wait for the one before.
// They also say where to look for it.
template <class C>
GDBP_CLONES void raise(const C* x, int64_t first, int64_t n, Largest<C>* to) {
  constexpr int64_t lanes = 256 / sizeof(C);
  C most[lanes];
  for (int64_t l = 0; l < lanes; ++l) most[l] = to->m;
  const int64_t whole = n / lanes * lanes;
  for (int64_t j = 0; j < whole; j += lanes)
    for (int64_t l = 0; l < lanes; ++l) most[l] = math::at_least(most[l], x[j + l]);
  for (int64_t j = whole; j < n; ++j) most[j - whole] = math::at_least(most[j - whole], x[j]);
  // In halves, and not one after the other, for the same reason.
  C top[lanes];
  for (int64_t l = 0; l < lanes; ++l) top[l] = most[l];
#pragma GCC unroll 8
  for (int64_t half = lanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) top[l] = math::at_least(top[l], top[half + l]);
  const C m = top[0];
  if (!(m > to->m)) return;
  int64_t j = 0;
  while (most[j] != m) ++j;
  while (x[j] != m) j += lanes;
  *to = {m, first + j};
}

// A line of cache, and a vector or a few.
template <class C>
constexpr int64_t kLanes = 64 / sizeof(C);

// Sums of a row's terms, lane by lane: as many of them as are formed at once, each its own chain.
template <class C>
struct Terms {
  double lanes[kLanes<C>] = {};
};

// e = exp(x - m), which may take x' place, and their sums but for the one at `hole`; n is a multiple of the lanes. What
// comes after, at `ahead`, is asked for meanwhile: an exponential leaves the memory idle.
template <class C>
GDBP_CLONES void add_terms(const C* x, C m, C* e, int64_t n, int64_t hole, const char* ahead, int64_t step,
                           Terms<C>* to) {
  constexpr int64_t L = kLanes<C>;
  C sum[L] = {};
  const bool is_here = hole >= 0 && hole < n;
  const int64_t lane = is_here ? hole % L : 0, begin = is_here ? hole - lane : 0;
  const int64_t ends[] = {begin, is_here ? begin + L : 0, n};
  int64_t j = 0;
  for (int stretch = 0; stretch < 3; ++stretch) {
    const C before = sum[lane];
    for (; j < ends[stretch]; j += L, ahead += step) {
      __builtin_prefetch(ahead, 0, 2);
#pragma GCC ivdep
      for (int64_t l = 0; l < L; ++l) {
        const C term = math::exp_of_nonpositive(x[j + l] - m);
        e[j + l] = term;
        sum[l] += term;
      }
    }
    if (stretch == 1) sum[lane] = before;
  }
  for (int64_t l = 0; l < L; ++l) to->lanes[l] += sum[l];
}

// The same without sums.
template <class C>
GDBP_CLONES void form_terms(const C* x, C m, C* e, int64_t n, const char* ahead, int64_t step) {
  constexpr int64_t L = kLanes<C>;
  int64_t j = 0;
  for (; j + L <= n; j += L, ahead += step) {
    __builtin_prefetch(ahead, 0, 2);
#pragma GCC ivdep
    for (int64_t l = 0; l < L; ++l) e[j + l] = math::exp_of_nonpositive(x[j + l] - m);
  }
  for (; j < n; ++j) e[j] = math::exp_of_nonpositive(x[j] - m);
}

// sum of w_j (m - x_j): no term is negative, so none cancels
template <class X, class C>
GDBP_CLONES C distance(const X* x, const C* weight, C m, int64_t n) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += weight[j] * (m - widen(x[j]));
  return sum;
}

// weight: null where no class has a share of its own. What differs is asked outside of the loops: inside it would
// become a masked load from address 0, which takes a processor hundreds of cycles.
template <class X, class C>
GDBP_CLONES void label_gradient(const C* e, X* grad, const C* weight, C factor, C uniform, C scale, int64_t n) {
  const C both = scale * factor;
  if (uniform == C(0) && math::abs(both) < math::Format<C>::infinity) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) grad[j] = narrow<X>(e[j] * both);
  } else if (weight) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) grad[j] = narrow<X>(scale * (e[j] * factor - uniform * weight[j]));
  } else {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) grad[j] = narrow<X>(scale * (e[j] * factor - uniform));
  }
}

template <class C>
struct SoftTerms {
  C distance = 0, total = 0, others = 0;
};

template <class X, class C>
GDBP_CLONES SoftTerms<C> soft_terms(const X* x, const X* t, const C* weight, C keep, C smooth, C m, int64_t n) {
  C far = 0, total = 0, others = 0;
#pragma omp simd reduction(+ : far, total, others)
  for (int64_t j = 0; j < n; ++j) {
    const C v = widen(x[j]), a = weight[j] * (keep * widen(t[j]) + smooth);
    far += soft_loss(a, v, m, C(0));
    total += a;
    others += v == m ? C(0) : a;
  }
  return {far, total, others};
}

template <class X, class C>
GDBP_CLONES void soft_gradient(const X* x, const X* t, const C* e, X* grad, const C* weight, C keep, C smooth,
                               const SoftGradient<C> of, int64_t n) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    const C a = weight[j] * (keep * widen(t[j]) + smooth);
    grad[j] = narrow<X>(of(widen(x[j]), e[j], a));
  }
}

template <class X, class C>
GDBP_CLONES void target_gradient(const X* x, X* grad, const C* weight, C m, C log_total, C scale, int64_t n) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) grad[j] = narrow<X>(scale * weight[j] * (log_total - (widen(x[j]) - m)));
}

// Classes that are computed together: few enough for sums in C, the sum of the pieces being a double, and for what a
// piece needs to stay in the nearest cache.
constexpr int64_t kPiece = 1024;

// Calls f(first, n) for the pieces of a row.
template <class F>
void for_pieces(int64_t classes, const F& f) {
  for (int64_t first = 0; first < classes; first += kPiece) f(first, std::min(kPiece, classes - first));
}

// exp(x - m) of one row after the other.
template <class C>
class Exponentials {
 public:
  // keep: whether all of a row's are asked for again once their sum is known. Of rows that do not stay in cache they
  // are formed once more.
  Exponentials(int64_t classes, bool keep)
      : classes_(classes),
        wide_(classes > kMostKept),
        kept_(keep && !wide_),
        own_(kept_ ? classes : std::min(classes, kPiece)),
        e_(own_.data()) {}

  // Keeps the next row's where its gradient will be, if it has their type: what is written to is fetched while they are
  // formed, and there is less to hold in cache.
  template <class X>
  void keep_in(X* gradient) {
    if constexpr (std::is_same_v<X, C>)
      if (kept_) e_ = gradient;
  }
  template <class X>
  Largest<C> largest(const X* x) {
    Largest<C> largest;
    for_pieces(classes_, [&](int64_t first, int64_t n) { raise(widened(x, first, n), first, n, &largest); });
    return largest;
  }
  // The terms of a piece, once the largest logit is known, into `to`, all but its own, which is 1. The next row will be
  // wanted meanwhile, of which this one's largest logit was the first reader.
  template <class X>
  void form(const X* x, Largest<C> largest, int64_t first, int64_t n, Terms<C>* to) {
    const bool is_widened = kept_ && !std::is_same_v<X, C>;
    const C* const from = is_widened ? at(first) : widened(x, first, n);
    const char* const ahead = reinterpret_cast<const char*>(x + first + (wide_ ? 0 : classes_));
    const int64_t whole = n / kLanes<C> * kLanes<C>, hole = largest.place - first;
    add_terms(from, largest.m, at(first), whole, hole, ahead, kLanes<C> * sizeof(X), to);
    if (whole == n) return;
    C rest[kLanes<C>];
    std::fill(std::copy(from + whole, from + n, rest), rest + kLanes<C>, -std::numeric_limits<C>::infinity());
    add_terms(rest, largest.m, rest, kLanes<C>, hole - whole, ahead, 0, to);
    std::copy(rest, rest + (n - whole), at(first) + whole);
  }
  // The exponentials of a piece, once all are formed or were not to be kept.
  template <class X>
  const C* get(const X* x, C m, int64_t first, int64_t n) {
    const char* const ahead = reinterpret_cast<const char*>(x + first + kPiece);
    if (!kept_) form_terms(widened(x, first, n), m, at(first), n, ahead, kLanes<C> * sizeof(X));
    return at(first);
  }

 private:
  static constexpr int64_t kMostKept = int64_t(1) << 16;
  C* at(int64_t first) { return e_ + (kept_ ? first : 0); }
  // In a loop of its own: in loops over two types g++ takes half as many elements at a time.
  template <class X>
  const C* widened(const X* x, int64_t first, int64_t n) {
    if constexpr (std::is_same_v<X, C>) {
      return x + first;
    } else {
      widen_all(x + first, at(first), n);
      return at(first);
    }
  }

  const int64_t classes_;
  const bool wide_;
  const bool kept_;
  std::vector<C> own_;
  C* e_;
};

}  // namespace gdbp::loss
