// The memory of a step: buffers whose times of use do not overlap lie at the same place.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace gdbp::step {

class Arena {
 public:
  using Id = int;
  static constexpr Id kNone = -1;

  // Forgets all buffers and keeps the memory.
  void clear();
  // A buffer that is written at time `first` and read until `last`, both counted in.
  Id request(int64_t bytes, int first, int last);
  void extend(Id id, int last);
  // Gives every buffer its place. No request may follow.
  void lay_out();

  void* at(Id id) const { return id == kNone ? nullptr : memory_.get() + buffers_[id].offset; }
  int64_t bytes(Id id) const { return buffers_[id].bytes; }
  // Of all buffers as they lie, and as they would one beside the other.
  int64_t size() const { return size_; }
  int64_t size_unshared() const;

 private:
  struct Buffer {
    int64_t bytes;
    int first, last;
    int64_t offset;
  };
  struct Free {
    void operator()(char* p) const;
  };
  std::vector<Buffer> buffers_;
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0, capacity_ = 0;
};

}  // namespace gdbp::step
