// Blocks of memory that stay warm: what is freed is kept with its pages for the next request of about its size. The
// kernel hands out a fresh page for 0.25 us to 2.5 us, many times what it costs to write it.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>

#include "memory/size_class.h"

namespace gdbp::memory {

// An amount as torch.cuda.memory_stats tells of it.
class Amount {
 public:
  struct Reading {
    int64_t current, peak, allocated, freed;
  };
  int64_t current() const { return current_.load(std::memory_order_relaxed); }
  void add(size_t bytes) {
    allocated_.fetch_add(int64_t(bytes), std::memory_order_relaxed);
    const int64_t now = current_.fetch_add(int64_t(bytes), std::memory_order_relaxed) + int64_t(bytes);
    raise(peak_, now);
  }
  void subtract(size_t bytes) { current_.fetch_sub(int64_t(bytes), std::memory_order_relaxed); }
  void reset_peak() { peak_.store(current(), std::memory_order_relaxed); }
  Reading read() const {
    const int64_t now = current(), allocated = allocated_.load(std::memory_order_relaxed);
    return {now, peak_.load(std::memory_order_relaxed), allocated, allocated - now};
  }
  static void raise(std::atomic<int64_t>& peak, int64_t to) {
    int64_t seen = peak.load(std::memory_order_relaxed);
    while (seen < to && !peak.compare_exchange_weak(seen, to, std::memory_order_relaxed)) {
    }
  }

 private:
  std::atomic<int64_t> current_{0}, peak_{0}, allocated_{0};
};

struct Stats {
  Amount::Reading allocated, reserved;  // bytes of blocks in use; bytes got from the system
  int64_t cached;                       // bytes of blocks kept for reuse
  int64_t hits, misses, retries;
};

// Every function may be called by any thread at any time, also in a child after fork.
class Cache {
 public:
  // The only one; it lives to the very end, as tensors may.
  static Cache& instance();

  // max_bytes: what is kept for reuse at most. With kByUse as much as leaves everything held within 5/4 of what
  // was in use at most since the cache was last emptied.
  static constexpr int64_t kByUse = INT64_MAX;
  void enable(int64_t max_bytes, bool huge_pages) noexcept;
  // Blocks in use stay valid, and go back to the system when they are freed.
  void disable() noexcept;
  // Gives back to the system what is kept for reuse.
  void empty() noexcept;
  // The same where the system has no memory, and counted where anything was kept.
  void give_way() noexcept;

  // Memory on a page boundary. nullptr where the request is not for the cache, being small or the cache off; or
  // where the system has no memory, even after all that is kept was given back.
  void* allocate(size_t bytes) noexcept;
  // Whether the block was ours, and is free now.
  bool release(void* block) noexcept;

  Stats stats() const noexcept;
  void reset_peaks() noexcept;

 private:
  struct Free {
    void* block;
    uint64_t time;
  };
  // The free blocks of a class, oldest first. The newest is taken first, for it may still be in the CPU's cache.
  struct Pool {
    std::deque<Free> blocks;
    std::atomic<uint64_t> oldest{UINT64_MAX};
    void note_oldest() { oldest.store(blocks.empty() ? UINT64_MAX : blocks.front().time, std::memory_order_relaxed); }
  };
  static constexpr int kLocks = 16;

  Cache();
  std::mutex& lock_of(int index) { return locks_[index % kLocks]; }
  enum class End { kOldest, kNewest };
  void* take(int index, End end) noexcept;
  bool keep(int index, void* block) noexcept;
  void trim(int64_t bytes) noexcept;
  int64_t room_beside(size_t bytes) const noexcept;
  void* map(int index) noexcept;
  void unmap(int index, void* block) noexcept;

  std::atomic<bool> enabled_{false}, huge_pages_{true};
  std::atomic<int64_t> max_bytes_{kByUse};
  std::atomic<uint64_t> clock_{0};
  Amount in_use_, held_;
  std::atomic<int64_t> most_in_use_{0}, cached_{0}, hits_{0}, misses_{0}, retries_{0};
  // A lock serves the classes that are kLocks apart: sizes next to each other never wait for each other.
  std::mutex locks_[kLocks];
  Pool pools_[kClasses];
};

}  // namespace gdbp::memory
