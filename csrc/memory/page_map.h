// Which address is one of our blocks, and of which class: a table over the address space, two loads and no lock. The
// deleter of a tensor gets a bare address, and has to tell our blocks from malloc's.
#pragma once
#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace gdbp::memory {

// Zero pages cost nothing until they are written.
inline void* map_zeros(size_t bytes) {
  void* const p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

// Only as a variable of static storage: it starts as zeros that nobody has to write, and lives to the very end.
class PageMap {
 public:
  // 0 where no block of ours begins, and else what set() was told last.
  uint8_t get(const void* address) const noexcept {
    const auto bits = reinterpret_cast<uintptr_t>(address);
    // Nearly all blocks of malloc, which are small, are told by this alone.
    if (bits & (kPage - 1) || bits >> kAddressBits) return 0;
    const Leaf* const leaf = root_[bits / kPage / kLeafPages].load(std::memory_order_acquire);
    return leaf ? (*leaf)[bits / kPage % kLeafPages].load(std::memory_order_acquire) : 0;
  }

  // False, and nothing is set, where there is no memory for the table, or none of it is for such an address.
  bool set(const void* address, uint8_t tag) noexcept {
    const auto bits = reinterpret_cast<uintptr_t>(address);
    if (bits & (kPage - 1) || bits >> kAddressBits) return false;
    std::atomic<Leaf*>& place = root_[bits / kPage / kLeafPages];
    Leaf* leaf = place.load(std::memory_order_acquire);
    if (!leaf) {
      auto* const fresh = static_cast<Leaf*>(map_zeros(sizeof(Leaf)));
      if (!fresh) return false;
      if (place.compare_exchange_strong(leaf, fresh, std::memory_order_acq_rel)) {
        leaf = fresh;
      } else {
        munmap(fresh, sizeof(Leaf));  // another thread was first
      }
    }
    (*leaf)[bits / kPage % kLeafPages].store(tag, std::memory_order_release);
    return true;
  }

 private:
  static constexpr size_t kPage = 4096, kLeafPages = size_t(1) << 20;  // a leaf is for 4 GiB
  static constexpr int kAddressBits = 48;
  using Leaf = std::atomic<uint8_t>[kLeafPages];

  std::atomic<Leaf*> root_[(size_t(1) << kAddressBits) / kPage / kLeafPages];
};

}  // namespace gdbp::memory
