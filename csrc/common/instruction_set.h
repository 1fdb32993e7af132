// What this processor runs: the loader asks the same question for GDBP_CLONES.
#pragma once

namespace gdbp {

// The level of x86-64 whose instructions there are: 4 (AVX-512), 3 (AVX2), or 0 for none of them.
inline int x86_64_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 4;
  if (__builtin_cpu_supports("x86-64-v3")) return 3;
#endif
  return 0;
}

}  // namespace gdbp
