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

// The larger of m and what is in x, halves side by side: a maximum has to wait for the one before.
template <class C>
GDBP_CLONES C largest_of(const C* x, C m, int64_t n) {
  const int64_t half = n / 2;
  C second = n % 2 != 0 && x[n - 1] > m ? x[n - 1] : m;
#pragma omp simd reduction(max : m, second)
  for (int64_t j = 0; j < half; ++j) {
    m = x[j] > m ? x[j] : m;
    second = x[half + j] > second ? x[half + j] : second;
  }
  return second > m ? second : m;
}

// A line of cache, and a vector or a few.
template <class C>
constexpr int64_t kLanes = 64 / sizeof(C);

// Sums of a row's terms, lane by lane: as many of them as are formed at once, each its own chain.
template <class V, int64_t lanes>
struct Terms {
  V others[lanes] = {}, largest[lanes] = {};  // over the logits below m; how many are m
};

// e = exp(x - m), which may take x' place; n is a multiple of the lanes. What comes after, at `ahead`, is asked for
// meanwhile: an exponential leaves the memory idle.
template <class C>
GDBP_CLONES void add_terms(const C* x, C m, C* e, int64_t n, const char* ahead, int64_t step,
                           Terms<double, kLanes<C>>* to) {
  Terms<C, kLanes<C>> sum;
  for (int64_t j = 0; j < n; j += kLanes<C>, ahead += step) {
    __builtin_prefetch(ahead, 0, 2);
#pragma GCC ivdep
    for (int64_t l = 0; l < kLanes<C>; ++l) {
      const C v = x[j + l], term = math::exp_of_nonpositive(v - m), one = v == m ? C(1) : C(0);
      e[j + l] = term;
      sum.others[l] += term - one;
      sum.largest[l] += one;
    }
  }
  for (int64_t l = 0; l < kLanes<C>; ++l) {
    to->others[l] += sum.others[l];
    to->largest[l] += sum.largest[l];
  }
}

// sum of w_j (m - x_j): no term is negative, so none cancels
template <class X, class C>
GDBP_CLONES C distance(const X* x, const C* weight, C m, int64_t n) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += weight[j] * (m - widen(x[j]));
  return sum;
}

// weight: null where no class has a share of its own. Asked outside of the loop: inside it would become a masked load
// from address 0, which takes a processor hundreds of cycles.
template <class X, class C>
GDBP_CLONES void label_gradient(const C* e, X* grad, const C* weight, C factor, C uniform, C scale, int64_t n) {
  if (weight) {
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
        e_((kept_ ? classes : std::min(classes, kPiece)) + kLanes<C>) {}

  template <class X>
  C largest(const X* x) {
    C m = -std::numeric_limits<C>::infinity();
    for_pieces(classes_, [&](int64_t first, int64_t n) { m = largest_of(widened(x, first, n), m, n); });
    return m;
  }
  // The terms of a piece, once m is known, into `to`. The next row will be wanted meanwhile, of which this one's
  // largest logit was the first reader.
  template <class X>
  void form(const X* x, C m, int64_t first, int64_t n, Terms<double, kLanes<C>>* to) {
    const bool is_widened = kept_ && !std::is_same_v<X, C>;
    form(is_widened ? at(first) : widened(x, first, n), m, first, n, x + first + (wide_ ? 0 : classes_), to);
  }
  // The exponentials of a piece, once all are formed or were not to be kept.
  template <class X>
  const C* get(const X* x, C m, int64_t first, int64_t n) {
    Terms<double, kLanes<C>> unused;
    if (!kept_) form(widened(x, first, n), m, first, n, x + first + kPiece, &unused);
    return at(first);
  }

 private:
  static constexpr int64_t kMostKept = int64_t(1) << 16;
  template <class X>
  void form(const C* from, C m, int64_t first, int64_t n, const X* ahead, Terms<double, kLanes<C>>* to) {
    const char* const wanted = reinterpret_cast<const char*>(ahead);
    const int64_t whole = n / kLanes<C> * kLanes<C>;
    add_terms(from, m, at(first), whole, wanted, kLanes<C> * sizeof(X), to);
    if (whole == n) return;
    C rest[kLanes<C>];
    std::fill(std::copy(from + whole, from + n, rest), rest + kLanes<C>, -std::numeric_limits<C>::infinity());
    add_terms(rest, m, at(first) + whole, kLanes<C>, wanted, 0, to);
  }
  C* at(int64_t first) { return e_.data() + (kept_ ? first : 0); }
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
  std::vector<C> e_;
};

}  // namespace gdbp::loss
