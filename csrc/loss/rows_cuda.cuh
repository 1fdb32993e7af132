// Cross-entropy of one row on CUDA: who reads it, its loss, and its gradient.
#pragma once
#include "common/math_cuda.cuh"
#include "common/reduce_cuda.cuh"
#include "loss/loss.h"
#include "loss/loss_math.h"

namespace gdbp::loss {
namespace {

using cuda::load;
using cuda::store;

// How the rows lie, and who reads one: rows in one piece, in 16-byte accesses, by a team of `threads`; or rows across
// memory, whose neighbours lie side by side, by a thread each.
template <class T, int threads>
struct Pieces : cuda::Team<threads> {
  static constexpr int width = cuda::kWidth<T>;
  static constexpr int64_t step = int64_t(threads) * width;
  // Accesses of a thread that are under way together.
  static constexpr int ahead = threads < 1024 ? 4 : 2;
  const Rows<T>& in;
  int64_t start;

  __device__ __forceinline__ Pieces(const Rows<T>& in, int64_t row) : in(in), start(row * in.classes) {}
  // Classes before the first that an access can start with: rows of an odd length start anywhere.
  __device__ __forceinline__ int front() const {
    const int before = int(-reinterpret_cast<uintptr_t>(in.logits + start) % 16 / sizeof(T));
    return before < in.classes ? before : int(in.classes);
  }
  __device__ __forceinline__ int64_t at(int64_t j) const { return start + j; }
  __device__ __forceinline__ void read(const T* from, int64_t j, int count, Compute<T> (&to)[width]) const {
    load(from + at(j), count, aligned(from), to);
  }
  __device__ __forceinline__ void write(T* to, int64_t j, int count, const Compute<T> (&from)[width]) const {
    store(to + at(j), count, aligned(to), from);
  }
  __device__ __forceinline__ bool aligned(const T* data) const { return cuda::aligned(data + at(front())); }

  // f(j, count) for the classes j and further, `width` of them or those that are left, from the thread's piece at
  // `piece` on; the front comes last.
  template <class F>
  __device__ __forceinline__ void for_classes(const F& f, int64_t piece = Pieces::rank() * width) const {
    const int front = this->front();
    const int64_t pieces = cuda::ceil_div(in.classes - front, width) * width;
    for (; piece < pieces + front; piece += step) {
      const bool is_front = piece >= pieces;
      f(is_front ? 0 : front + piece, is_front ? front : cuda::neighbours<width>(front + piece, in.classes));
    }
  }
  // The same with the logits x of the classes: f(j, count, x).
  template <bool many = false, class F>
  __device__ __forceinline__ void for_logits(const F& f) const {
    int64_t piece = int64_t(Pieces::rank()) * width;
    if constexpr (many) {
      const int front = this->front();
      piece = cuda::for_vectors<ahead, width>(in.logits + at(front), piece, step, in.classes - front,
                                              [&](int64_t piece, auto& x) { f(front + piece, width, x); });
    }
    for_classes(
        [&](int64_t j, int count) {
          Compute<T> x[width];
          read(in.logits, j, count, x);
          f(j, count, x);
        },
        piece);
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
  template <class F>
  __device__ __forceinline__ void for_classes(const F& f) const {
    for (int64_t j = 0; j < in.classes; ++j) f(j, 1);
  }
  template <bool many = false, class F>
  __device__ __forceinline__ void for_logits(const F& f) const {
#pragma unroll 4
    for (int64_t j = 0; j < in.classes; ++j) {
      Compute<T> x[1];
      read(in.logits, j, 1, x);
      f(j, 1, x);
    }
  }
};

// The logits as the loss sees them.
template <int width, class T>
__device__ __forceinline__ void cap_all(const Rows<T>& in, Compute<T> (&x)[width]) {
  if (in.softcap == 0) return;
#pragma unroll
  for (int k = 0; k < width; ++k) x[k] = cap(x[k], in.softcap);
}
template <class T>
__device__ __forceinline__ Compute<T> logit(const Rows<T>& in, int64_t at) {
  const Compute<T> stored = cuda::widen_fast(in.logits[at]);
  return in.softcap != 0 ? cap(stored, in.softcap) : stored;
}

// The largest of some numbers, and of the others the sum of exp(x - largest): what has been found so far.
template <class T>
struct Largest {
  using C = Compute<T>;
  C m = C(-INFINITY), others = C(0);
  C count = C(0);  // how many are as large

  // As if a larger one had come; also where it has not.
  __device__ __forceinline__ void raise_to(C larger) {
    const bool is_larger = m < larger;
    const C factor = is_larger ? cuda::exp_fast<T>(m - larger) : C(1);
    others = (others + (is_larger ? count : C(0))) * factor;
    count = is_larger ? C(0) : count;
    m = is_larger ? larger : m;
  }
  // `n` of x, none of which is larger than m.
  template <int width>
  __device__ __forceinline__ void add(const C (&x)[width], int n) {
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (k >= n) continue;
      const C e = cuda::exp_fast<T>(x[k] - m);
      const bool as_large = x[k] == m;
      others += as_large ? C(0) : e;
      count += as_large ? C(1) : C(0);
    }
  }
};

template <int width, class C>
__device__ __forceinline__ C largest_of(const C (&x)[width], int count, C m) {
#pragma unroll
  for (int k = 0; k < width; ++k) m = k < count ? cuda::Max{}(m, x[k]) : m;
  return m;
}

template <class Access, class T>
__device__ __forceinline__ Softmax<Compute<T>> softmax_of(const Rows<T>& in, const Access& row) {
  using C = Compute<T>;
  constexpr int width = Access::width;
  Largest<T> found;
  if constexpr (width == 1) {
    // A thread alone would have what it found rounded anew with every larger logit.
    row.for_logits([&](int64_t, int count, C(&x)[width]) {
      cap_all(in, x);
      found.m = largest_of(x, count, found.m);
    });
    row.for_logits([&](int64_t, int count, C(&x)[width]) {
      cap_all(in, x);
      found.add(x, count);
    });
  } else if (in.softcap == 0) {
    row.template for_logits<true>([&](int64_t, int count, C(&x)[width]) {
      found.raise_to(largest_of(x, count, found.m));
      found.add(x, count);
    });
  } else {
    row.for_logits([&](int64_t, int count, C(&x)[width]) {
      cap_all(in, x);
      found.raise_to(largest_of(x, count, found.m));
      found.add(x, count);
    });
  }
  found.raise_to(Access::reduce(found.m, cuda::Max{}, C(-INFINITY)));
  const C others = Access::reduce(found.others, cuda::Sum{}, C(0));
  const C largest = Access::reduce(found.count, cuda::Sum{}, C(0));
  // m - m: NaN where there is no finite largest logit.
  return {found.m, others + (largest - C(1)) + (found.m - found.m)};
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

// One row: its loss, and what the gradient is made of. Every thread of the team knows both.
template <class T, class Access, bool soft>
struct Row {
  using C = Compute<T>;
  static constexpr int width = Access::width, kept = soft ? 4 : 2;

  const Rows<T>& in;
  const int64_t index;
  const Access access;
  C stats[kept] = {};  // see loss.h

  __device__ __forceinline__ Row(const Rows<T>& in, int64_t index) : in(in), index(index), access(in, index) {}

  __device__ __forceinline__ bool is_bad() const { return in.bad_label(index) != in.ignore_index; }

  __device__ __forceinline__ C loss() {
    if constexpr (soft) {
      return loss_of_probabilities();
    } else {
      if (is_bad()) return stats[0] = stats[1] = C(NAN);
      const Labels<C> labels(in, index);
      return labels.counts() ? loss_of(labels) : C(0);
    }
  }

  // The gradient, times what comes from upstream. Either may be null; for_probabilities is, where there are labels.
  __device__ __forceinline__ void write_gradient(C scale, T* for_logits, T* for_probabilities) const {
    if constexpr (soft) {
      write_soft_gradient(scale, for_logits, for_probabilities);
    } else {
      Labels<C> labels;
      if (!is_bad()) labels = Labels<C>(in, index);
      if (labels.counts()) return write_gradient_of(labels, scale, for_logits);
      C d[width];
#pragma unroll
      for (int k = 0; k < width; ++k) d[k] = is_bad() ? C(NAN) : C(0);
      access.for_classes([&](int64_t j, int count) { access.write(for_logits, j, count, d); });
    }
  }

 private:
  __device__ __forceinline__ C loss_of(const Labels<C>& labels) {
    const Softmax<C> softmax = softmax_of(in, access);
    stats[0] = softmax.m;
    stats[1] = softmax.others;
    C loss = labels.a * softmax.nll(logit(in, access.at(labels.first)));
    if (labels.second >= 0) loss += labels.b * softmax.nll(logit(in, access.at(labels.second)));
    if (labels.uniform != 0) {
      C distance = C(0);  // the sum of w_j (m - x_j): no term is negative, so none cancels
      access.for_logits([&](int64_t j, int count, C(&x)[width]) {
        cap_all(in, x);
#pragma unroll
        for (int k = 0; k < width; ++k)
          if (k < count) distance += in.weight_of(j + k) * (softmax.m - x[k]);
      });
      distance = Access::reduce(distance, cuda::Sum{}, C(0));
      loss += labels.uniform * (weight_sum<Access>(in) * softmax.log_total() + distance);
    }
    if (in.z != 0) loss += in.z * labels.weight * softmax.log_sum_exp() * softmax.log_sum_exp();
    return loss;
  }

  __device__ __forceinline__ C loss_of_probabilities() {
    const Softmax<C> softmax = softmax_of(in, access);
    const C log_total = softmax.log_total();
    C loss = C(0), total = C(0), others = C(0);
    access.for_classes([&](int64_t j, int count) {
      C x[width], t[width];
      access.read(in.logits, j, count, x);
      access.read(in.probabilities, j, count, t);
      cap_all(in, x);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (k >= count) continue;
        const C a = in.weight_of(j + k) * (in.keep * t[k] + in.smooth);
        loss += soft_loss(a, x[k], softmax.m, log_total);
        total += a;
        others += x[k] == softmax.m ? C(0) : a;
      }
    });
    // Without a finite largest logit, and so without classes, NaN as with labels.
    loss = Access::reduce(loss, cuda::Sum{}, C(0)) + (softmax.m - softmax.m);
    stats[0] = softmax.m;
    stats[1] = softmax.others;
    stats[2] = Access::reduce(total, cuda::Sum{}, C(0));
    stats[3] = Access::reduce(others, cuda::Sum{}, C(0));
    if (in.z != 0) loss += in.z * softmax.log_sum_exp() * softmax.log_sum_exp();
    return loss;
  }

  // The derivative of a capped logit, on top of what is upstream.
  __device__ __forceinline__ C slope(C stored) const { return in.softcap != 0 ? cap_slope(stored, in.softcap) : C(1); }

  __device__ __forceinline__ void write_gradient_of(const Labels<C>& labels, C scale, T* to) const {
    const Softmax<C> softmax{stats[0], stats[1]};
    const C all_weights = in.smooth != 0 ? weight_sum<Access>(in) : C(0);
    const LabelGradient<C> gradient(softmax, labels, all_weights, in.z, scale);
    // Where upstream and the row's factor together are beyond the numbers, their product with an exponential may not
    // be.
    const C both = gradient.factor() * scale;
    const bool fits = math::abs(both) < math::Format<C>::infinity;
    const C factor = fits ? both : gradient.factor(), rest = fits ? C(1) : scale;
    const auto at_label = [&](int64_t label, C own, C other) {
      const C stored = cuda::widen_fast(in.logits[access.at(label)]);
      return slope(stored) * gradient.at_label(own, other, in.weight_of(label), logit(in, access.at(label)));
    };
    const C first = at_label(labels.first, labels.a, labels.b);
    const C second = labels.second >= 0 ? at_label(labels.second, labels.b, labels.a) : C(0);
    // On each class, times its weight; none of an infinite gradient either where there is no share.
    const C pull = labels.uniform != 0 ? labels.uniform * scale : C(0);
    // The gradient may take the place of the logits.
    Access::sync();
    if (in.softcap == 0 && pull == 0 && fits) {
      access.template for_logits<true>([&](int64_t j, int count, C(&x)[width]) {
#pragma unroll
        for (int k = 0; k < width; ++k) x[k] = cuda::exp_fast<T>(x[k] - softmax.m) * factor;
        set(labels.first - j, first, count, x);
        if (labels.second >= 0) set(labels.second - j, second, count, x);
        access.write(to, j, count, x);
      });
      return;
    }
    access.for_logits([&](int64_t j, int count, C(&x)[width]) {
      C d[width];
#pragma unroll
      for (int k = 0; k < width; ++k) d[k] = slope(x[k]);
      cap_all(in, x);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (k < count) d[k] *= cuda::exp_fast<T>(x[k] - softmax.m) * factor * rest - pull * in.weight_of(j + k);
      }
      set(labels.first - j, first, count, d);
      if (labels.second >= 0) set(labels.second - j, second, count, d);
      access.write(to, j, count, d);
    });
  }
  // One of a few neighbours, if it is one of them.
  __device__ __forceinline__ static void set(int64_t k, C value, int count, C (&to)[width]) {
    if (uint64_t(k) >= uint64_t(count)) return;
#pragma unroll
    for (int i = 0; i < width; ++i) to[i] = i == int(k) ? value : to[i];
  }

  __device__ __forceinline__ void write_soft_gradient(C scale, T* for_logits, T* for_probabilities) const {
    const Softmax<C> softmax{stats[0], stats[1]};
    const SoftGradient<C> gradient(softmax, stats[2], stats[3], in.z, scale);
    const C log_total = softmax.log_total();
    access.for_classes([&](int64_t j, int count) {
      C stored[width], x[width], t[width], dx[width], dt[width];
      access.read(in.logits, j, count, stored);
      access.read(in.probabilities, j, count, t);
#pragma unroll
      for (int k = 0; k < width; ++k) x[k] = stored[k];
      cap_all(in, x);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (k >= count) continue;
        const C w = in.weight_of(j + k);
        dx[k] =
            slope(stored[k]) * gradient(x[k], cuda::exp_fast<T>(x[k] - softmax.m), w * (in.keep * t[k] + in.smooth));
        dt[k] = scale * in.keep * w * (log_total - (x[k] - softmax.m));
      }
      if (for_logits != nullptr) access.write(for_logits, j, count, dx);
      if (for_probabilities != nullptr) access.write(for_probabilities, j, count, dt);
    });
  }
};

}  // namespace
}  // namespace gdbp::loss
