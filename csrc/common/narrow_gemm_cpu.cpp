#include "common/narrow_gemm_cpu.h"

#include <algorithm>
#include <utility>

#include "common/instruction_set.h"
#include "common/macros.h"

// What is inlined into a kernel is compiled for its instruction set.
#define GDBP_INLINE inline __attribute__((always_inline))

namespace gdbp::cpu {
namespace {

// g++ keeps such a vector in a register of its size where there is one.
template <class T, int kBytes>
struct Register {
  typedef T type __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};

// A tile of c, kRows high and kVectors wide, summed in registers. The last vector has `lanes` columns of c.
template <class T, int kBytes, int kRows, int kVectors>
GDBP_INLINE void tile(const Product<T>& p, int64_t row, int64_t col, int64_t lanes) {
  using V = typename Register<T, kBytes>::type;
  constexpr int64_t kLanes = kBytes / int64_t(sizeof(T));
  const T* const a = p.a + row * p.a_row;
  V sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) sum[i][j] = V{};
  const auto add = [&](const T* b, int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int64_t at = begin; at < end; ++at, b += p.b.stride) {
      V right[kVectors];
      for (int j = 0; j < kVectors; ++j) right[j] = *reinterpret_cast<const V*>(b + j * kLanes);
      for (int i = 0; i < kRows; ++i) {
        const T left = a[i * p.a_row + at * p.a_col];
        for (int j = 0; j < kVectors; ++j) sum[i][j] += left * right[j];
      }
    }
  };
  add(p.b.data + col, 0, std::min(p.k, p.b.split));
  if (p.b.split < p.k) add(p.b.last + col, p.b.split, p.k);
  if (p.bias) {
    for (int j = 0; j < kVectors; ++j) {
      const V bias = *reinterpret_cast<const V*>(p.bias + col + j * kLanes);
      for (int i = 0; i < kRows; ++i) sum[i][j] += bias;
    }
  }
  const int whole = lanes < kLanes ? kVectors - 1 : kVectors;
  for (int i = 0; i < kRows; ++i) {
    T* const c = p.c + (row + i) * p.c_stride + col;
    for (int j = 0; j < kVectors; ++j) {
      if (j < whole) {
        V* const to = reinterpret_cast<V*>(c + j * kLanes);
        *to = p.adds ? *to + sum[i][j] : sum[i][j];
      } else {
        for (int64_t lane = 0; lane < lanes; ++lane)
          c[j * kLanes + lane] = p.adds ? c[j * kLanes + lane] + sum[i][j][lane] : sum[i][j][lane];
      }
    }
  }
}

template <class T, int kBytes, int kVectors>
GDBP_INLINE void column(const Product<T>& p, int64_t col) {
  constexpr int64_t kLanes = kBytes / int64_t(sizeof(T));
  // As many sums as the multipliers take at once, or some more, and no more than there are registers for.
  constexpr int kRows = kVectors == 1 ? 8 : kVectors == 2 ? 6 : 4;
  const int64_t lanes = std::min(kLanes, p.n - col - (kVectors - 1) * kLanes);
  int64_t row = 0;
  for (; row + kRows <= p.m; row += kRows) tile<T, kBytes, kRows, kVectors>(p, row, col, lanes);
  for (; row + 4 <= p.m; row += 4) tile<T, kBytes, 4, kVectors>(p, row, col, lanes);
  for (; row + 2 <= p.m; row += 2) tile<T, kBytes, 2, kVectors>(p, row, col, lanes);
  if (row < p.m) tile<T, kBytes, 1, kVectors>(p, row, col, lanes);
}

template <class T, int kBytes, int kVectors>
GDBP_INLINE void product(const Product<T>& p) {
  constexpr int64_t kLanes = kBytes / int64_t(sizeof(T));
  int64_t col = 0;
  for (; col + kVectors * kLanes <= p.n; col += kVectors * kLanes) column<T, kBytes, kVectors>(p, col);
  const int64_t rest = (p.n - col + kLanes - 1) / kLanes;
  if constexpr (kVectors >= 4)
    if (rest == 4) return column<T, kBytes, 4>(p, col);
  if constexpr (kVectors >= 3)
    if (rest == 3) return column<T, kBytes, 3>(p, col);
  if (rest == 2) return column<T, kBytes, 2>(p, col);
  if (rest == 1) return column<T, kBytes, 1>(p, col);
}

// Of a square of vectors: in steps of 1, 2, 4, ... rows, the quarters off the diagonal change places.
template <class V, int kStep, int... lane>
GDBP_INLINE void exchange(V& upper, V& lower, std::integer_sequence<int, lane...>) {
  constexpr int kLanes = sizeof...(lane);
  const V first = __builtin_shufflevector(upper, lower, (lane & kStep ? kLanes + lane - kStep : lane)...);
  lower = __builtin_shufflevector(upper, lower, (lane & kStep ? kLanes + lane : lane + kStep)...);
  upper = first;
}
template <int kStep, class V, int kLanes>
GDBP_INLINE void transpose(V (&rows)[kLanes]) {
  if constexpr (kStep < kLanes) {
    for (int row = 0; row < kLanes; ++row)
      if (!(row & kStep)) exchange<V, kStep>(rows[row], rows[row + kStep], std::make_integer_sequence<int, kLanes>());
    transpose<2 * kStep>(rows);
  }
}

template <class T, int kBytes>
GDBP_INLINE void pack(const T* from, int64_t rows, int64_t cols, int64_t from_stride, T* to) {
  using V = typename Register<T, kBytes>::type;
  constexpr int kLanes = kBytes / int(sizeof(T));
  const int64_t stride = padded<T>(rows);
  for (int64_t row = 0; row < stride; row += kLanes) {
    const int64_t there = std::clamp<int64_t>(rows - row, 0, kLanes);
    int64_t col = 0;
    for (; col + kLanes <= cols; col += kLanes) {
      V square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = i < there ? *reinterpret_cast<const V*>(from + (row + i) * from_stride + col) : V{};
      transpose<1>(square);
      for (int i = 0; i < kLanes; ++i) *reinterpret_cast<V*>(to + (col + i) * stride + row) = square[i];
    }
    for (; col < cols; ++col)
      for (int64_t i = 0; i < kLanes; ++i)
        to[col * stride + row + i] = i < there ? from[(row + i) * from_stride + col] : T(0);
  }
}

// The sum of a vector's lanes: halves are added until one is left.
template <int kStep, class V, int... lane>
GDBP_INLINE void fold(V& sum, std::integer_sequence<int, lane...> lanes) {
  if constexpr (kStep > 0) {
    sum += __builtin_shufflevector(sum, sum, (lane ^ kStep)...);
    fold<kStep / 2>(sum, lanes);
  }
}

// kDots of them side by side, as one would wait for itself.
template <class T, int kBytes, int kDots>
GDBP_INLINE void dots(int64_t k, const T* a, const T* b, const T* bias, T* c) {
  using V = typename Register<T, kBytes>::type;
  constexpr int kLanes = kBytes / int(sizeof(T));
  V sum[kDots];
  for (int i = 0; i < kDots; ++i) sum[i] = V{};
  int64_t at = 0;
  for (; at + kLanes <= k; at += kLanes)
    for (int i = 0; i < kDots; ++i)
      sum[i] += *reinterpret_cast<const V*>(a + at) * *reinterpret_cast<const V*>(b + i * k + at);
  for (int i = 0; i < kDots; ++i) {
    fold<kLanes / 2>(sum[i], std::make_integer_sequence<int, kLanes>());
    T total = sum[i][0];
    for (int64_t rest = at; rest < k; ++rest) total += a[rest] * b[i * k + rest];
    c[i] = bias ? total + bias[i] : total;
  }
}
template <class T, int kBytes>
GDBP_INLINE void all_dots(int64_t m, int64_t n, int64_t k, const T* a, const T* b, const T* bias, T* c) {
  constexpr int kDots = 4;
  for (int64_t row = 0; row < m; ++row, a += k, c += n) {
    int64_t col = 0;
    for (; col + kDots <= n; col += kDots)
      dots<T, kBytes, kDots>(k, a, b + col * k, bias ? bias + col : nullptr, c + col);
    for (; col < n; ++col) dots<T, kBytes, 1>(k, a, b + col * k, bias ? bias + col : nullptr, c + col);
  }
}

template <class T>
struct Kernels {
  void (*product)(const Product<T>&);
  void (*dots)(int64_t m, int64_t n, int64_t k, const T* a, const T* b, const T* bias, T* c);
  void (*pack)(const T* from, int64_t rows, int64_t cols, int64_t stride, T* to);
};

// target_clones can't choose between them: the size of a vector is part of the code.
#define GDBP_KERNELS(level, target, bytes, vectors)                                                        \
  template <class T>                                                                                       \
  target void product_##level(const Product<T>& p) {                                                       \
    product<T, bytes, vectors>(p);                                                                         \
  }                                                                                                        \
  template <class T>                                                                                       \
  target void dots_##level(int64_t m, int64_t n, int64_t k, const T* a, const T* b, const T* bias, T* c) { \
    all_dots<T, bytes>(m, n, k, a, b, bias, c);                                                            \
  }                                                                                                        \
  template <class T>                                                                                       \
  target void pack_##level(const T* from, int64_t rows, int64_t cols, int64_t stride, T* to) {             \
    pack<T, bytes>(from, rows, cols, stride, to);                                                          \
  }                                                                                                        \
  template <class T>                                                                                       \
  constexpr Kernels<T> kKernels_##level = {&product_##level<T>, &dots_##level<T>, &pack_##level<T>};

#if defined(GDBP_HAS_CLONES)
GDBP_KERNELS(v4, __attribute__((target("arch=x86-64-v4"))), 64, 4)
GDBP_KERNELS(v3, __attribute__((target("arch=x86-64-v3"))), 32, 2)
GDBP_KERNELS(any, , 16, 2)

template <class T>
Kernels<T> best() {
  const int level = x86_64_level();
  return level == 4 ? kKernels_v4<T> : level == 3 ? kKernels_v3<T> : kKernels_any<T>;
}
#else
#if defined(__AVX512F__)
GDBP_KERNELS(here, , 64, 4)
#elif defined(__AVX__)
GDBP_KERNELS(here, , 32, 2)
#else
GDBP_KERNELS(here, , 16, 2)
#endif

template <class T>
Kernels<T> best() {
  return kKernels_here<T>;
}
#endif

template <class T>
const Kernels<T> kBest = best<T>();

}  // namespace

template <class T>
void narrow_gemm(const Product<T>& product) {
  kBest<T>.product(product);
}

template <class T>
void narrow_dots(int64_t m, int64_t n, int64_t k, const T* a, const T* b, const T* bias, T* c) {
  kBest<T>.dots(m, n, k, a, b, bias, c);
}

template <class T>
void pack_transposed(const T* from, int64_t rows, int64_t cols, int64_t stride, T* to) {
  kBest<T>.pack(from, rows, cols, stride, to);
}

template void narrow_gemm(const Product<float>&);
template void narrow_gemm(const Product<double>&);
template void narrow_dots(int64_t, int64_t, int64_t, const float*, const float*, const float*, float*);
template void narrow_dots(int64_t, int64_t, int64_t, const double*, const double*, const double*, double*);
template void pack_transposed(const float*, int64_t, int64_t, int64_t, float*);
template void pack_transposed(const double*, int64_t, int64_t, int64_t, double*);

}  // namespace gdbp::cpu
