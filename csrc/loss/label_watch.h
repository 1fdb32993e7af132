// Labels out of range on CUDA, told without waiting: the kernel's finding travels to the host behind the kernel,
// and the next call raises it.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <mutex>

namespace gdbp::loss {

class LabelWatch {
 public:
  static LabelWatch& instance() {
    static LabelWatch* const watch = new LabelWatch;  // outlives the CUDA runtime's teardown
    return *watch;
  }

  // bad: the first bad row, else -1, and its label, on the device.
  void follow(const at::Tensor& bad) {
    const std::lock_guard lock(mutex_);
    if (!slots_.defined()) {
      slots_ = at::empty({kSlots, 2}, at::TensorOptions(at::kLong).pinned_memory(true));
      slots_.fill_(kNothing);
    }
    // Of more calls in flight than this the oldest goes unheard.
    const at::Tensor slot = slots_.select(0, next_++ % kSlots);
    slot.fill_(kNothing);
    slot.copy_(bad, /*non_blocking=*/true);
  }

  // Raises what has arrived by now.
  void raise_arrived() {
    const std::lock_guard lock(mutex_);
    if (!slots_.defined()) return;
    volatile int64_t* const values = slots_.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < kSlots; ++i) {
      const int64_t row = values[2 * i], label = values[2 * i + 1];
      if (row < 0) continue;
      values[2 * i] = kNothing;
      TORCH_CHECK_INDEX(false, "Target ", label, " is out of bounds: an earlier cross_entropy got it for row ", row,
                        " and its loss was NaN; expected a class that the logits have, or ignore_index");
    }
  }

 private:
  static constexpr int64_t kSlots = 256, kNothing = -2;
  std::mutex mutex_;
  at::Tensor slots_;
  int64_t next_ = 0;
};

}  // namespace gdbp::loss
