// Products of small matrices by a warp, 16 x 16 times 16 x 8, summed in float: the tensor cores' m16n8k16 for bfloat16
// and float16, two m16n8k8 for tf32, and the loads that put parts of shared memory where these want them. tests/cudasim
// computes the same from what the lanes hold (PTX ISA, "Matrix fragments for mma"), so that indices are tested
// without a GPU.
//
// With g = lane / 4 and t = lane % 4 a lane holds, two 16-bit elements in a register:
//   a (16 x 16): rows g, g + 8, g, g + 8, columns 2t and 2t + 1 (in the last two registers 8 further right)
//   b (16 x 8):  rows 2t and 2t + 1 (in the second register 8 further down), column g
//   c (16 x 8):  row g, columns 2t and 2t + 1; row g + 8, the same
// and of 32-bit elements, of which a product takes 8 of the 16 at a time, one in a register:
//   a (16 x 8):  rows g, g + 8, g, g + 8, columns t (in the last two registers t + 4)
//   b (8 x 8):   row t (in the second register t + 4), column g
// Which of the 8 is called t does not matter, if it is the same for both factors: here it is 2t, and 2t + 1 for t + 4,
// so that a lane reads neighbours.
#pragma once
#include <cmath>

#include "common/dtype_cuda.cuh"
#include "common/reduce_cuda.cuh"

namespace gdbp::cuda {

// What the factors of products are: BFloat16, Float16, or float in one of two ways.
struct Tf32 {};  // rounded to 10 bits behind the point
struct Fp32 {};  // each as a sum of two such: three products, and some 2^-21 of one is lost

template <class F>
struct ElementOf {
  using type = F;
};
template <>
struct ElementOf<Tf32> {
  using type = float;
};
template <>
struct ElementOf<Fp32> {
  using type = float;
};
template <class F>
using Element = typename ElementOf<F>::type;

template <class F>
struct FragmentA {
  unsigned r[2 * sizeof(Element<F>)];
};
template <class F>
struct FragmentB {
  unsigned r[sizeof(Element<F>)];
};
struct alignas(16) FragmentC {
  float r[4] = {};
};

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % kWarp; }

template <class T>
__device__ __forceinline__ float low_of(unsigned pair) {
  return widen_fast(T{uint16_t(pair & 0xffffu)});
}
template <class T>
__device__ __forceinline__ float high_of(unsigned pair) {
  return widen_fast(T{uint16_t(pair >> 16)});
}

// Two neighbouring elements in shared memory.
template <class T>
struct Pair {
  unsigned bits;
  __device__ __forceinline__ static Pair of(float low, float high) {
    return {unsigned(narrow_fast<T>(low).bits) | unsigned(narrow_fast<T>(high).bits) << 16};
  }
  __device__ __forceinline__ float low() const { return low_of<T>(bits); }
  __device__ __forceinline__ float high() const { return high_of<T>(bits); }
};
template <>
struct alignas(8) Pair<float> {
  float first, second;
  __device__ __forceinline__ static Pair of(float low, float high) { return {low, high}; }
  __device__ __forceinline__ float low() const { return first; }
  __device__ __forceinline__ float high() const { return second; }
};
template <class T>
__device__ __forceinline__ Pair<T>& pair_at(T* first) {
  return *reinterpret_cast<Pair<T>*>(first);
}
template <class T>
__device__ __forceinline__ const Pair<T>& pair_at(const T* first) {
  return *reinterpret_cast<const Pair<T>*>(first);
}

#ifndef GDBP_CUDASIM

// c += a b
template <class T>
__device__ __forceinline__ void multiply_halves(FragmentC& c, const FragmentA<T>& a, const FragmentB<T>& b) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c.r[0]), "+f"(c.r[1]), "+f"(c.r[2]), "+f"(c.r[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c.r[0]), "+f"(c.r[1]), "+f"(c.r[2]), "+f"(c.r[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
  }
}

// c += a b of 8 columns and rows.
__device__ __forceinline__ void multiply_tf32(FragmentC& c, const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.r[0]), "+f"(c.r[1]), "+f"(c.r[2]), "+f"(c.r[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// To nearest, ties away from zero.
__device__ __forceinline__ unsigned to_tf32(float x) {
  unsigned rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}

// Four 8x8 matrices from shared memory, whose rows lie anywhere at 16 bytes: lane 8i + r says where row r of matrix i
// is. Lane 4g + t gets elements 2t and 2t + 1 of row g of each; `transposed`, of column g.
template <bool transposed, class T>
__device__ __forceinline__ void load_matrices(const T* row, unsigned& r0, unsigned& r1, unsigned& r2, unsigned& r3) {
  const auto address = unsigned(__cvta_generic_to_shared(row));
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
                 : "r"(address)
                 : "memory");
  }
}

#else

// Both instructions have their elements in the same lanes: a row of a in the four lanes 4g + k, a column of b likewise,
// and in the second half of the registers what is further right or down. dot(x, y): of what two registers hold.
template <int registers_a, int registers_b, class Dot>
void multiply_lanes(FragmentC& c, const unsigned (&a)[registers_a], const unsigned (&b)[registers_b], const Dot& dot) {
  struct A {
    unsigned r[registers_a];
  };
  struct B {
    unsigned r[registers_b];
  };
  const cudasim::Place here = cudasim::Place::current();
  const int g = lane_id() / 4, t = lane_id() % 4;
  A own_a;
  B own_b;
  std::copy(a, a + registers_a, own_a.r);
  std::copy(b, b + registers_b, own_b.r);
  A rows[4];
  B columns[2][4];
  for (int k = 0; k < 4; ++k) rows[k] = cudasim::shuffle(kAllLanes, own_a, 4 * g + k, here);
  for (int n = 0; n < 2; ++n)
    for (int k = 0; k < 4; ++k) columns[n][k] = cudasim::shuffle(kAllLanes, own_b, 4 * (2 * t + n) + k, here);
  for (int i = 0; i < 4; ++i) {
    double sum = c.r[i];
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 4; ++k) sum += dot(rows[k].r[i / 2 + 2 * half], columns[i % 2][k].r[half]);
    // Towards 0, as an H200 was seen to round.
    const float nearest = float(sum);
    c.r[i] = std::abs(double(nearest)) > std::abs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
  }
}

template <class T>
void multiply_halves(FragmentC& c, const FragmentA<T>& a, const FragmentB<T>& b) {
  multiply_lanes(c, a.r, b.r, [](unsigned x, unsigned y) -> double {
    return double(low_of<T>(x)) * low_of<T>(y) + double(high_of<T>(x)) * high_of<T>(y);
  });
}

// What lies behind the 10 bits is not looked at.
inline void multiply_tf32(FragmentC& c, const unsigned (&a)[4], const unsigned (&b)[2]) {
  constexpr unsigned seen = 0xffffe000u;
  multiply_lanes(c, a, b, [](unsigned x, unsigned y) -> double {
    return double(bit_cast<float>(x & seen)) * bit_cast<float>(y & seen);
  });
}

inline unsigned to_tf32(float x) {
  const auto bits = bit_cast<unsigned>(x);
  return x - x == 0 ? (bits + 0x1000u) & 0xffffe000u : bits;
}

template <bool transposed, class T>
void load_matrices(const T* row, unsigned& r0, unsigned& r1, unsigned& r2, unsigned& r3) {
  const cudasim::Place here = cudasim::Place::current();
  const int g = lane_id() / 4, t = lane_id() % 4;
  unsigned* const out[] = {&r0, &r1, &r2, &r3};
  for (int i = 0; i < 4; ++i) {
    const T *first, *second;
    if (transposed) {
      first = cudasim::shuffle(kAllLanes, row, 8 * i + 2 * t, here) + g;
      second = cudasim::shuffle(kAllLanes, row, 8 * i + 2 * t + 1, here) + g;
    } else {
      first = cudasim::shuffle(kAllLanes, row, 8 * i + g, here) + 2 * t;
      second = first + 1;
    }
    *out[i] = unsigned(first->bits) | unsigned(second->bits) << 16;
  }
}

#endif

// A factor as it goes into a product, or where that takes more than one, as it is.
template <class F>
__device__ __forceinline__ unsigned factor(float x) {
  return std::is_same_v<F, Tf32> ? to_tf32(x) : bit_cast<unsigned>(x);
}

template <int count>
__device__ __forceinline__ void split(const unsigned* x, unsigned (&large)[count], unsigned (&small)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    large[i] = to_tf32(bit_cast<float>(x[i]));
    small[i] = to_tf32(bit_cast<float>(x[i]) - bit_cast<float>(large[i]));
  }
}

// c += a b
template <class F>
__device__ __forceinline__ void multiply(FragmentC& c, const FragmentA<F>& a, const FragmentB<F>& b) {
  if constexpr (sizeof(Element<F>) == 2) {
    multiply_halves(c, a, b);
  } else {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const unsigned *const x = a.r + 4 * step, *const y = b.r + 2 * step;
      if constexpr (std::is_same_v<F, Tf32>) {
        multiply_tf32(c, {x[0], x[1], x[2], x[3]}, {y[0], y[1]});
      } else {
        unsigned large_x[4], small_x[4], large_y[2], small_y[2];
        split(x, large_x, small_x);
        split(y, large_y, small_y);
        // The tensor cores' sums are rounded towards 0: what is lost on the way adds up, and is not to in float32.
        FragmentC sum;
        multiply_tf32(sum, small_x, large_y);
        multiply_tf32(sum, large_x, small_y);
        multiply_tf32(sum, large_x, large_y);
#pragma unroll
        for (int i = 0; i < 4; ++i) c.r[i] += sum.r[i];
      }
    }
  }
}

// Of `a`, what a lane holds of the 8x8 part that begins i % 2 * 8 rows and i / 2 * 8 columns further: row g, columns 2t
// and 2t + 1, which is also what it holds of such a part of `c`.
template <class F>
__device__ __forceinline__ Pair<Element<F>> pair_of(const FragmentA<F>& a, int i) {
  if constexpr (sizeof(Element<F>) == 2) {
    return {a.r[i]};
  } else {
    return {bit_cast<float>(a.r[i / 2 * 4 + i % 2]), bit_cast<float>(a.r[i / 2 * 4 + i % 2 + 2])};
  }
}
template <class F>
__device__ __forceinline__ void set_pair(FragmentA<F>& a, int i, Pair<Element<F>> pair) {
  if constexpr (sizeof(Element<F>) == 2) {
    a.r[i] = pair.bits;
  } else {
    a.r[i / 2 * 4 + i % 2] = bit_cast<unsigned>(pair.low());
    a.r[i / 2 * 4 + i % 2 + 2] = bit_cast<unsigned>(pair.high());
  }
}

// Of a matrix in shared memory, `stride` elements from row to row: its 16x16 part that begins at `at`, as `a`.
template <class F>
__device__ __forceinline__ FragmentA<F> load_a(const Element<F>* at, int stride) {
  FragmentA<F> a;
  if constexpr (sizeof(Element<F>) == 2) {
    const int i = lane_id() / 8, r = lane_id() % 8;
    load_matrices<false>(at + (r + i % 2 * 8) * stride + i / 2 * 8, a.r[0], a.r[1], a.r[2], a.r[3]);
  } else {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pair<float> pair = pair_at(at + (g + i % 2 * 8) * stride + i / 2 * 8 + 2 * t);
      a.r[i / 2 * 4 + i % 2] = factor<F>(pair.low());
      a.r[i / 2 * 4 + i % 2 + 2] = factor<F>(pair.high());
    }
  }
  return a;
}
// The same of its transpose, which is to be multiplied: at[k * stride + m].
template <class F>
__device__ __forceinline__ FragmentA<F> load_a_transposed(const Element<F>* at, int stride) {
  FragmentA<F> a;
  if constexpr (sizeof(Element<F>) == 2) {
    const int i = lane_id() / 8, r = lane_id() % 8;
    load_matrices<true>(at + (r + i / 2 * 8) * stride + i % 2 * 8, a.r[0], a.r[1], a.r[2], a.r[3]);
  } else {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) a.r[i] = factor<F>(at[(i / 4 * 8 + 2 * t + i / 2 % 2) * stride + g + i % 2 * 8]);
  }
  return a;
}
// Two neighbouring 16x8 parts as `b`: at[k * stride + n], and of a matrix that is to be transposed, at[n * stride + k].
template <class F>
__device__ __forceinline__ void load_b(const Element<F>* at, int stride, FragmentB<F>& left, FragmentB<F>& right) {
  if constexpr (sizeof(Element<F>) == 2) {
    const int i = lane_id() / 8, r = lane_id() % 8;
    load_matrices<true>(at + (r + i % 2 * 8) * stride + i / 2 * 8, left.r[0], left.r[1], right.r[0], right.r[1]);
  } else {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const row = at + (i / 2 * 8 + 2 * t + i % 2) * stride + g;
      left.r[i] = factor<F>(row[0]);
      right.r[i] = factor<F>(row[8]);
    }
  }
}
// as_is: what is there are factors already.
template <class F, bool as_is = false>
__device__ __forceinline__ void load_b_transposed(const Element<F>* at, int stride, FragmentB<F>& left,
                                                  FragmentB<F>& right) {
  if constexpr (sizeof(Element<F>) == 2) {
    const int i = lane_id() / 8, r = lane_id() % 8;
    load_matrices<false>(at + (r + i / 2 * 8) * stride + i % 2 * 8, left.r[0], left.r[1], right.r[0], right.r[1]);
  } else {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pair<float> pair = pair_at(at + (g + i / 2 * 8) * stride + i % 2 * 8 + 2 * t);
      FragmentB<F>& part = i / 2 == 0 ? left : right;
      part.r[i % 2 * 2] = as_is ? bit_cast<unsigned>(pair.low()) : factor<F>(pair.low());
      part.r[i % 2 * 2 + 1] = as_is ? bit_cast<unsigned>(pair.high()) : factor<F>(pair.high());
    }
  }
}

}  // namespace gdbp::cuda
