#include "common/map_cuda.cuh"
#include "dropout/dropout.h"
#include "dropout/dropout_math.h"

namespace gdbp::dropout {
namespace {

template <class T>
struct Elements {
  static constexpr int width = cuda::kWidth<T>;
  Mask<Compute<T>> mask;
  const uint64_t* seed;
  uint64_t layer;
  const T* in;
  T* out;
  bool vectors;

  __device__ void operator()(int64_t begin, int count) const {
    Mask<Compute<T>> drop = mask;
    drop.seed = combine_seed(*seed, layer);
    Compute<T> x[width];
    cuda::load(in + begin, count, vectors, x);
#pragma unroll
    for (int k = 0; k < width; ++k) x[k] = drop(x[k], begin + k);
    cuda::store(out + begin, count, vectors, x);
  }
};

}  // namespace

int dropout_cuda(const Args& a, void* stream) {
  return dispatch(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const in = static_cast<const T*>(a.in);
    T* const out = static_cast<T*>(a.out);
    const bool vectors = cuda::aligned(in) && cuda::aligned(out);
    return cuda::map(a.numel, Elements<T>{mask<Compute<T>>(a.p), a.seed, a.layer, in, out, vectors}, stream);
  });
}

}  // namespace gdbp::dropout
