// How a kernel tells of a label out of range.
#pragma once
#include <cstdint>

#include "common/launch.h"

namespace gdbp::loss {

// bad: row, or -1 for none, and label; or null, where nobody asks. The row last, as it may be the host that reads them
// meanwhile (label_slots.h).
__device__ __forceinline__ void tell_label(int64_t* bad, int64_t row, int64_t label) {
  if (bad == nullptr) return;
  volatile int64_t* const to = bad;
  to[1] = label;
  __threadfence_system();
  to[0] = row;
}

}  // namespace gdbp::loss
