// Products of small matrices by a warp: the tensor cores' m16n8k16 for bfloat16 and float16, summed in float, and the
// loads that put 8x8 matrices of shared memory where it wants them. tests/cudasim computes the same from what the
// lanes hold (PTX ISA, "Matrix fragments for mma.m16n8k16"), so that indices are tested without a GPU.
//
// With g = lane / 4 and t = lane % 4 a lane holds, two 16-bit elements in a register:
//   a (16 x 16): rows g, g + 8, g, g + 8, columns 2t and 2t + 1 (in the last two registers 8 further right)
//   b (16 x 8):  rows 2t and 2t + 1 (in the second register 8 further down), column g
//   c (16 x 8):  row g, columns 2t and 2t + 1; row g + 8, the same
#pragma once
#include "common/dtype_cuda.cuh"
#include "common/reduce_cuda.cuh"

namespace gdbp::cuda {

struct FragmentA {
  unsigned r[4];
};
struct FragmentB {
  unsigned r[2];
};
struct FragmentC {
  float r[4] = {};
};

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % kWarp; }

template <class T>
__device__ __forceinline__ unsigned pack(float low, float high) {
  return unsigned(narrow_fast<T>(low).bits) | unsigned(narrow_fast<T>(high).bits) << 16;
}
template <class T>
__device__ __forceinline__ float low_of(unsigned pair) {
  return widen_fast(T{uint16_t(pair & 0xffffu)});
}
template <class T>
__device__ __forceinline__ float high_of(unsigned pair) {
  return widen_fast(T{uint16_t(pair >> 16)});
}

#ifndef GDBP_CUDASIM

// c += a b
template <class T>
__device__ __forceinline__ void multiply(FragmentC& c, const FragmentA& a, const FragmentB& b) {
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

template <class T>
void multiply(FragmentC& c, const FragmentA& a, const FragmentB& b) {
  const cudasim::Place here = cudasim::Place::current();
  const int g = lane_id() / 4, t = lane_id() % 4;
  FragmentA rows[4];
  FragmentB columns[2][4];
  for (int k = 0; k < 4; ++k) rows[k] = cudasim::shuffle(kAllLanes, a, 4 * g + k, here);
  for (int n = 0; n < 2; ++n)
    for (int k = 0; k < 4; ++k) columns[n][k] = cudasim::shuffle(kAllLanes, b, 4 * (2 * t + n) + k, here);
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2, column = i % 2;
    float sum = 0;
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 4; ++k) {
        const unsigned x = rows[k].r[row + 2 * half], y = columns[column][k].r[half];
        sum += low_of<T>(x) * low_of<T>(y) + high_of<T>(x) * high_of<T>(y);
      }
    }
    c.r[i] += sum;
  }
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

// Of a matrix in shared memory, `stride` elements from row to row: its 16x16 part that begins at `at`, as `a`.
template <class T>
__device__ __forceinline__ FragmentA load_a(const T* at, int stride) {
  const int i = lane_id() / 8, r = lane_id() % 8;
  FragmentA a;
  load_matrices<false>(at + (r + i % 2 * 8) * stride + i / 2 * 8, a.r[0], a.r[1], a.r[2], a.r[3]);
  return a;
}
// The same of its transpose, which is to be multiplied: at[k * stride + m].
template <class T>
__device__ __forceinline__ FragmentA load_a_transposed(const T* at, int stride) {
  const int i = lane_id() / 8, r = lane_id() % 8;
  FragmentA a;
  load_matrices<true>(at + (r + i / 2 * 8) * stride + i % 2 * 8, a.r[0], a.r[1], a.r[2], a.r[3]);
  return a;
}
// Two neighbouring 16x8 parts as `b`: at[k * stride + n], and of a matrix that is to be transposed, at[n * stride + k].
template <class T>
__device__ __forceinline__ void load_b(const T* at, int stride, FragmentB& left, FragmentB& right) {
  const int i = lane_id() / 8, r = lane_id() % 8;
  load_matrices<true>(at + (r + i % 2 * 8) * stride + i / 2 * 8, left.r[0], left.r[1], right.r[0], right.r[1]);
}
template <class T>
__device__ __forceinline__ void load_b_transposed(const T* at, int stride, FragmentB& left, FragmentB& right) {
  const int i = lane_id() / 8, r = lane_id() % 8;
  load_matrices<false>(at + (r + i / 2 * 8) * stride + i % 2 * 8, left.r[0], left.r[1], right.r[0], right.r[1]);
}

}  // namespace gdbp::cuda
