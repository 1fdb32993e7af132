#include "common/map_cpu.h"
#include "common/rows_cpu.h"
#include "step/elementwise.h"

namespace gdbp::step {
namespace {

// Calls f with the element type; half types do not come here.
template <class F>
void dispatch_wide(Dtype dtype, const F& f) {
  if (dtype == Dtype::float64) {
    f(Type<double>{});
  } else {
    f(Type<float>{});
  }
}

}  // namespace

void activation_forward_cpu(Dtype dtype, Activation activation, int64_t n, const void* in, void* out) {
  dispatch_wide(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    cpu::for_pieces(n, [&](int64_t begin, int64_t end) {
      const cpu::Rows<const T> x{static_cast<const T*>(in) + begin, n};
      cpu::activate<T>(activation, x, {static_cast<T*>(out) + begin, n}, 1, end - begin);
    });
  });
}

void activation_backward_cpu(Dtype dtype, Activation activation, int64_t n, const void* saved, void* grad) {
  dispatch_wide(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    cpu::for_pieces(n, [&](int64_t begin, int64_t end) {
      const cpu::Rows<const T> s{static_cast<const T*>(saved) + begin, n};
      const cpu::Rows<T> g{static_cast<T*>(grad) + begin, n};
      cpu::activate_backward<T>(activation, g, s, g, 1, end - begin);
    });
  });
}

}  // namespace gdbp::step
