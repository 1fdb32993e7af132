#include "memory/memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pybind11/stl.h>

#include <atomic>
#include <optional>
#include <string>

#include "memory/cache.h"

namespace gdbp::memory {

namespace py = pybind11;

namespace {

std::atomic<int64_t> out_of_memory{0};

// What the cache does not take is torch's business, and so is the error where there is no memory.
void* torch_memory(size_t bytes) {
  try {
    return c10::alloc_cpu(bytes);
  } catch (const c10::Error&) {
    Cache::instance().give_way();  // for small blocks, before which the cache has not tried it
  }
  try {
    return c10::alloc_cpu(bytes);
  } catch (const c10::Error&) {
    ++out_of_memory;
    c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
    throw;
  }
}

// The address is all that the deleter gets, as with torch's own allocator: storages that share, copy on write or
// change hands look at it.
class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* block = Cache::instance().allocate(bytes);
    if (!block) block = torch_memory(bytes);
    c10::profiledCPUMemoryReporter().New(block, bytes);
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void release(void* block) {
    if (!block) return;
    c10::profiledCPUMemoryReporter().Delete(block);
    if (!Cache::instance().release(block)) c10::free_cpu(block);
  }
};

// Storages keep a pointer to the allocator they came from, so it lives to the very end.
Allocator& allocator() {
  static Allocator& instance = *new Allocator;
  return instance;
}

// At torch's own priority, the lowest: whoever registers another allocator later gets his way, as without us.
// False, and nothing is changed, where somebody has done so already.
bool register_allocator() {
  c10::Allocator* const current = c10::GetCPUAllocator();
  if (current == &allocator()) return true;
  if (current != c10::GetDefaultCPUAllocator()) return false;
  c10::SetCPUAllocator(&allocator());
  return c10::GetCPUAllocator() == &allocator();
}

void unregister_allocator() {
  if (c10::GetCPUAllocator() == &allocator()) c10::SetCPUAllocator(c10::GetDefaultCPUAllocator());
}

void enable(std::optional<int64_t> max_bytes, bool huge_pages) {
  Cache::instance().enable(max_bytes.value_or(Cache::kByUse), huge_pages);
}

py::dict stats() {
  py::dict result;
  const auto put = [&](const std::string& name, const Amount::Reading& amount) {
    result[py::str(name + ".all.current")] = amount.current;
    result[py::str(name + ".all.peak")] = amount.peak;
    result[py::str(name + ".all.allocated")] = amount.allocated;
    result[py::str(name + ".all.freed")] = amount.freed;
  };
  const Stats stats = Cache::instance().stats();
  put("allocated_bytes", stats.allocated);
  put("reserved_bytes", stats.reserved);
  result["cached_bytes.all.current"] = stats.cached;
  result["num_hits"] = stats.hits;
  result["num_misses"] = stats.misses;
  result["num_alloc_retries"] = stats.retries;
  result["num_ooms"] = out_of_memory.load();
  return result;
}

}  // namespace

void bind(py::module_& module) {
  // Registering is apart from enabling, for benchmarks that switch between warm memory and torch's allocator.
  module.def("cpu_cache_register", &register_allocator);
  module.def("cpu_cache_unregister", &unregister_allocator);
  module.def("cpu_cache_enable", &enable, py::arg("max_bytes"), py::arg("huge_pages"));
  module.def("cpu_cache_disable", [] { Cache::instance().disable(); });
  module.def("cpu_cache_empty", [] { Cache::instance().empty(); });
  module.def("cpu_cache_stats", &stats);
  module.def("cpu_cache_reset_peaks", [] { Cache::instance().reset_peaks(); });
}

}  // namespace gdbp::memory
