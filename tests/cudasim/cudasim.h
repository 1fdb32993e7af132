// CUDA kernels on a CPU: the part of the CUDA language that gdbp's kernels use, for g++.
//
// Every CUDA thread is a fiber that runs until it meets a barrier, a shuffle or its end. Blocks run one after
// another. In which order the runnable fibers of a block go on is a Schedule: a kernel that is right gives
// the same result under all of them. What CUDA leaves undefined is made visible: shared memory holds garbage
// (NaN as a number) at the start of a block, a lane outside a shuffle's mask sends garbage, and a barrier
// that not all threads reach, or reach in different places, throws Error with a sentence. Compile with
// -fsanitize=address,undefined to have every access to global and local memory checked.
//
// Not modelled: streams (launches finish before they return), memory order between blocks, cooperative
// groups, textures, inline PTX. Memory order within a block is that of the schedule.
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Shared memory is the only thread-local memory of the program, so engine.cpp can find and spoil it.
#define __shared__ static thread_local

#define CUDART_VERSION 13000
using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// Those of the fiber that is running.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cudasim {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The order in which the threads of a block go on. Each warp runs as far as it can before the next one
// starts, in the order of their numbers or the other way round, and so do the lanes of a warp between two
// waits; or both orders are drawn anew all the time, and warps stop on the way.
enum class Schedule { forward, reverse, random };
void set_schedule(Schedule schedule, unsigned seed = 0);

// The sizes that a launch may have, as on a GPU of compute capability 7.0 and up; shared memory as on 9.0.
constexpr unsigned kMaxThreads = 1024, kMaxGridX = 2147483647, kMaxGridYZ = 65535;
constexpr size_t kMaxArgumentBytes = 32764, kMaxSharedBytes = 224 * 1024;

int run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
void* dynamic_shared();

// Where in the source a thread waits: threads that meet must meet in the same place.
using Place = std::source_location;
void block_barrier(Place place);
// What a lane hands over at once, at most.
struct alignas(16) Word {
  unsigned char bytes[16];
};
// Waits for the lanes of `mask`; `source` says whose word this lane gets.
Word warp_exchange(unsigned mask, const Word& word, int source, Place place);
unsigned warp_ballot(unsigned mask, bool vote, Place place);
int lane();

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
           Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<std::decay_t<Parameters>> && ...),
                "kernel arguments are copied as bytes");
  static_assert((sizeof(std::decay_t<Parameters>) + ... + 0) <= kMaxArgumentBytes, "too many kernel arguments");
  const std::tuple<std::decay_t<Parameters>...> copies(std::forward<Arguments>(arguments)...);
  return run(grid, block, shared_bytes, [&] { std::apply(kernel, copies); });
}

template <class T>
T shuffle(unsigned mask, T value, int source, Place place) {
  static_assert(sizeof(T) <= sizeof(Word), "a lane hands over that much at once");
  Word word{};
  std::memcpy(&word, &value, sizeof(T));
  word = warp_exchange(mask, word, source, place);
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

}  // namespace cudasim

inline void __syncthreads(cudasim::Place here = cudasim::Place::current()) { cudasim::block_barrier(here); }
inline void __syncwarp(unsigned mask = ~0u, cudasim::Place here = cudasim::Place::current()) {
  cudasim::warp_exchange(mask, {}, cudasim::lane(), here);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, cudasim::Place here = cudasim::Place::current()) {
  return cudasim::shuffle(mask, value, cudasim::lane() ^ flip, here);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, cudasim::Place here = cudasim::Place::current()) {
  const int source = cudasim::lane() + int(distance);
  return cudasim::shuffle(mask, value, source < warpSize ? source : cudasim::lane(), here);
}
inline void __threadfence() {}
inline void __threadfence_system() {}
inline unsigned __ballot_sync(unsigned mask, int vote, cudasim::Place here = cudasim::Place::current()) {
  return cudasim::warp_ballot(mask, vote != 0, here);
}

// One fiber runs at a time, so an ordinary update is atomic.
template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}
template <class T>
T atomicMin(T* at, T value) {
  const T old = *at;
  *at = value < old ? value : old;
  return old;
}

template <class T>
void __stwb(T* at, T value) {
  *at = value;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
