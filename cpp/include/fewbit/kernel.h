// How a kernel is declared, compiled once per instruction set, and chosen at run time.
//
// Every op has one args struct. FEWBIT_KERNEL(Args) declares its kernel in each ISA's namespace;
// cpp/cpu/<op>.cpp defines it as FEWBIT_ISA::kernel and is compiled once per ISA. There is no
// registration code and hence nothing that could run with instructions the CPU lacks.
#pragma once
#include <cstdint>

namespace fewbit {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512vnni = 3, avx512amx = 4 };
constexpr int isa_count = 5;

template <class Args>
using Kernel = void (*)(const Args&, int64_t begin, int64_t end);  // tasks [begin, end)

namespace cpu {

Isa isa();                      // the one in use
Isa best_isa();                 // the best that this CPU and this build have
void set_isa(Isa isa);          // trusts its argument: callers check against best_isa()
const char* isa_name(Isa isa);  // "scalar", "avx2", "avx512", "avx512vnni", "avx512amx"
bool parse_isa(const char* name, Isa* isa);

template <class Args>
struct KernelTable;  // one constant table per args struct, made by FEWBIT_KERNEL

template <class Args>
Kernel<Args> kernel_for() {
  return KernelTable<Args>::get(isa());
}

}  // namespace cpu
}  // namespace fewbit

#define FEWBIT_DECLARE(Args, isa)                       \
  namespace isa {                                       \
  void kernel(const Args&, int64_t begin, int64_t end); \
  }

#if defined(FEWBIT_HAS_X86)
#define FEWBIT_KERNEL_FOR(Args, vnni_isa, amx_isa)      \
  namespace cpu {                                       \
  FEWBIT_DECLARE(Args, scalar)                          \
  FEWBIT_DECLARE(Args, avx2)                            \
  FEWBIT_DECLARE(Args, avx512)                          \
  FEWBIT_DECLARE(Args, vnni_isa)                        \
  FEWBIT_DECLARE(Args, amx_isa)                         \
  template <>                                           \
  struct KernelTable<Args> {                            \
    static Kernel<Args> get(Isa isa) {                  \
      switch (isa) {                                    \
        case Isa::avx512amx: return &amx_isa::kernel;   \
        case Isa::avx512vnni: return &vnni_isa::kernel; \
        case Isa::avx512: return &avx512::kernel;       \
        case Isa::avx2: return &avx2::kernel;           \
        default: return &scalar::kernel;                \
      }                                                 \
    }                                                   \
  };                                                    \
  }
#else
#define FEWBIT_KERNEL_FOR(Args, vnni_isa, amx_isa)           \
  namespace cpu {                                            \
  FEWBIT_DECLARE(Args, scalar)                               \
  template <>                                                \
  struct KernelTable<Args> {                                 \
    static Kernel<Args> get(Isa) { return &scalar::kernel; } \
  };                                                         \
  }
#endif

// Kernels without byte products are the same with VNNI and AMX as without; those with are compiled
// for them too (the list of their files is in cpp/CMakeLists.txt).
#define FEWBIT_KERNEL(Args) FEWBIT_KERNEL_FOR(Args, avx512, avx512)
#define FEWBIT_DOT_KERNEL(Args) FEWBIT_KERNEL_FOR(Args, avx512vnni, avx512amx)
