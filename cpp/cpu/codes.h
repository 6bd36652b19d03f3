// Where a code sits in the packed layout (fewbit/layout.h), and how kernels read it.
#pragma once
#include "fewbit/layout.h"
#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

// Column i of a unit: which word, and the shift of its field in it. Planes of 3-bit codes: the low
// two bits as `field`, the top bit as `top` in word 2.
FEWBIT_INLINE constexpr int field_shift(int bits, int i) { return 8 * (i % 4) + bits * (i / 4); }

FEWBIT_INLINE uint8_t get_code(const uint32_t* unit, int bits, int i) {
  if (bits == 3) {
    const uint32_t low = unit[(i / 16) * panel_rows] >> field_shift(2, i % 16) & 3u;
    const uint32_t top = unit[2 * panel_rows] >> field_shift(1, i) & 1u;
    return uint8_t(low | top << 2);
  }
  return uint8_t(unit[0] >> field_shift(bits, i) & ((1u << bits) - 1u));
}

FEWBIT_INLINE void put_code(uint32_t* unit, int bits, int i, uint32_t code) {
  if (bits == 3) {
    unit[(i / 16) * panel_rows] |= (code & 3u) << field_shift(2, i % 16);
    unit[2 * panel_rows] |= (code >> 2 & 1u) << field_shift(1, i);
  } else {
    unit[0] |= code << field_shift(bits, i);
  }
}

// One unit of F32::width rows, held in registers.
template <int bits>
struct UnitRows {
  static constexpr int words = int(unit_words(bits));
  static constexpr int columns = int(unit_columns(bits));
  U32 w[words];

  FEWBIT_INLINE_MEMBER static UnitRows load(const uint32_t* p) {
    UnitRows u;
    for (int i = 0; i < words; ++i) u.w[i] = load_u32(p + i * panel_rows);
    return u;
  }
  // Codes of column i, one lane per row, as whole floats. i must be a constant after unrolling.
  FEWBIT_INLINE_MEMBER F32 column(int i) const {
    if constexpr (bits == 3) {
      const F32 low = low_bits<2>(w[i / 16] >> field_shift(2, i % 16));
      return fma(low_bits<1>(w[2] >> field_shift(1, i)), F32::set(4.0f), low);
    } else {
      return low_bits<bits>(w[0] >> field_shift(bits, i));
    }
  }
};

}  // namespace fewbit::cpu::FEWBIT_ISA
