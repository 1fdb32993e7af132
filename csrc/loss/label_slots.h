// Where findings of a device arrive: pairs of row and label in memory that it writes while the host reads.
#pragma once
#include <cstdint>
#include <limits>
#include <optional>

namespace gdbp::loss {

class LabelSlots {
 public:
  struct Finding {
    int64_t row, label;
  };
  static constexpr int64_t kSlots = 256;
  // A slot's two numbers before anything has arrived; a finding of nothing has a row below 0 too.
  static constexpr int64_t kNothing = std::numeric_limits<int64_t>::min() + 1;

  bool empty() const { return values_ == nullptr; }
  // memory: 2 * kSlots numbers that outlive this.
  void place(int64_t* memory) {
    values_ = memory;
    for (int64_t i = 0; i < 2 * kSlots; ++i) values_[i] = kNothing;
  }

  // The slot for the next finding, emptied. Of more in flight than there are slots the oldest goes unheard.
  int64_t next() {
    const int64_t slot = next_++ % kSlots;
    values_[2 * slot] = kNothing;
    values_[2 * slot + 1] = kNothing;
    return slot;
  }

  // A bad label that has arrived, if there is one, each told once. A row whose label is not there yet waits.
  std::optional<Finding> take() {
    for (int64_t slot = 0; values_ != nullptr && slot < kSlots; ++slot) {
      const Finding found{values_[2 * slot], values_[2 * slot + 1]};
      if (found.row < 0 || found.label == kNothing) continue;
      values_[2 * slot] = kNothing;
      return found;
    }
    return std::nullopt;
  }

 private:
  volatile int64_t* values_ = nullptr;
  int64_t next_ = 0;
};

}  // namespace gdbp::loss
