#include "fewbit/w4a4_linear.h"

#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

void kernel(const FoursOfWords& a, int64_t begin, int64_t end) {
  for (int64_t i = begin * (a.columns / 8); i < end * (a.columns / 8); ++i) {
    // Bytes of four codes each, their sign brought down: (c ^ 8) - 8, no borrow between bytes.
    uint64_t both = (a.words[i] & 0x0F0F0F0Fu) | uint64_t(a.words[i] >> 4 & 0x0F0F0F0Fu) << 32;
    both = ((both ^ 0x0808080808080808u) | 0x8080808080808080u) - 0x0808080808080808u;
    both ^= 0x8080808080808080u;
    __builtin_memcpy(a.q + i * 8, &both, 8);
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
