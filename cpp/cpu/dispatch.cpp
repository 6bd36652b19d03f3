// Which instruction set runs: the best that CPU and build have, or FEWBIT_ISA from the environment.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "fewbit/kernel.h"

namespace fewbit::cpu {

namespace {

constexpr const char* names[isa_count] = {"scalar", "avx2", "avx512", "avx512vnni"};

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

Isa best_isa() {
#if defined(FEWBIT_HAS_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512vnni") ? Isa::avx512vnni : Isa::avx512;
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
