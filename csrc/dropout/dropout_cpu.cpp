#include "common/map_cpu.h"
#include "dropout/dropout.h"
#include "dropout/dropout_math.h"

namespace gdbp::dropout {

int dropout_cpu(const Args& a, void*) {
  dispatch(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto mask = dropout::mask<Compute<T>>(a.p, combine_seed(*a.seed, a.layer));
    const T* const x = static_cast<const T*>(a.in);
    T* const y = static_cast<T*>(a.out);
    cpu::map(a.numel, [=](int64_t i) __attribute__((always_inline)) { y[i] = narrow<T>(mask(widen(x[i]), i)); });
  });
  return 0;
}

}  // namespace gdbp::dropout
