// Which instruction set runs: the best that CPU and build have, or FEWBIT_ISA from the environment.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "fewbit/kernel.h"

#if defined(FEWBIT_HAS_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fewbit::cpu {

namespace {

constexpr const char* names[isa_count] = {"scalar", "avx2", "avx512", "avx512vnni", "avx512amx"};

Isa initial_isa() {
  Isa wanted;
  const char* name = std::getenv("FEWBIT_ISA");
  // A name that is unknown or too much for this CPU is reported by the Python package on import;
  // here it only must not select instructions that would crash.
  if (name && parse_isa(name, &wanted) && wanted <= best_isa()) return wanted;
  return best_isa();
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

#if defined(FEWBIT_HAS_X86)
// Tiles of bytes, and the kernel's leave to use them: their 8 KiB of state are given on request,
// to the whole process and what it forks, and not under an old kernel or with signal stacks too
// small to hold them.
static bool amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & tile) || !(d & int8)) return false;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, its feature
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

Isa best_isa() {
#if defined(FEWBIT_HAS_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return !__builtin_cpu_supports("avx512vnni") ? Isa::avx512
           : amx()                               ? Isa::avx512amx
                                                 : Isa::avx512vnni;
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

Isa isa() { return current().load(std::memory_order_relaxed); }
void set_isa(Isa isa) { current().store(isa, std::memory_order_relaxed); }
const char* isa_name(Isa isa) { return names[static_cast<int>(isa)]; }

bool parse_isa(const char* name, Isa* isa) {
  for (int i = 0; i < isa_count; ++i)
    if (std::strcmp(name, names[i]) == 0) return *isa = static_cast<Isa>(i), true;
  return false;
}

}  // namespace fewbit::cpu
