// Labels out of range on CUDA, told without waiting: the kernel writes its finding into memory of the host, and the
// next call raises it. While a graph is recorded, findings are held back for whoever will replay it.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <mutex>
#include <utility>

#include "loss/label_slots.h"

namespace gdbp::loss {

class LabelWatch {
 public:
  static LabelWatch& instance() {
    static LabelWatch* const watch = new LabelWatch;  // outlives the CUDA runtime's teardown
    return *watch;
  }

  // Where a kernel on this device is to write what it finds: the first bad row, else -1, and its label, the row last.
  // Nothing else is sent behind it: in a stream of small kernels a copy takes as long as several of them.
  int64_t* place(at::Device device) {
    if (held().active) {
      held().bad = at::empty({2}, at::TensorOptions(device).dtype(at::kLong));
      return held().bad.mutable_data_ptr<int64_t>();
    }
    const std::lock_guard lock(mutex_);
    return next_slot().mutable_data_ptr<int64_t>();
  }
  // The same of a finding that lies on the device.
  void follow(const at::Tensor& bad) {
    const std::lock_guard lock(mutex_);
    next_slot().copy_(bad, /*non_blocking=*/true);
  }

  // From now on the last finding of this thread is kept, until release() returns it; undefined if there was none.
  void hold() { held() = {true, {}}; }
  at::Tensor release() { return std::exchange(held(), {}).bad; }

  // Raises what has arrived by now; while findings are held back whoever holds them does.
  void raise_arrived() {
    if (held().active) return;
    const std::lock_guard lock(mutex_);
    if (const auto found = slots_.take())
      TORCH_CHECK_INDEX(false, "Target ", found->label, " is out of bounds: an earlier cross_entropy got it for row ",
                        found->row, " and its loss was NaN; expected a class that the logits have, or ignore_index");
  }

 private:
  at::Tensor next_slot() {
    if (slots_.empty()) {
      // In inference mode it would be of use there alone.
      const c10::InferenceMode normal(false);
      memory_ = at::empty({LabelSlots::kSlots, 2}, at::TensorOptions(at::kLong).pinned_memory(true));
      slots_.place(memory_.mutable_data_ptr<int64_t>());
    }
    return memory_.select(0, slots_.next());
  }

  struct Held {
    bool active = false;
    at::Tensor bad;
  };
  static Held& held() {
    static thread_local Held held;
    return held;
  }

  std::mutex mutex_;
  LabelSlots slots_;
  at::Tensor memory_;
};

}  // namespace gdbp::loss
