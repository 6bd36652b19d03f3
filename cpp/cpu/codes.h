// Where a code sits in the packed layout (fewbit/layout.h), and how kernels read it.
#pragma once
#include "fewbit/layout.h"
#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

// Column i of a unit: which word, and the shift of its field in it. Planes of 3-bit codes: the low
// two bits as `field`, the top bit as `top` in word 2.
FEWBIT_INLINE constexpr int field_shift(int bits, int i) { return 8 * (i % 4) + bits * (i / 4); }

// Columns of group g and where they start.
FEWBIT_INLINE int64_t group_start(const PackedLayout& l, int64_t g) { return g * l.group_size; }
FEWBIT_INLINE int64_t group_length(const PackedLayout& l, int64_t g) {
  const int64_t start = g * l.group_size;
  return start + l.group_size <= l.columns ? l.group_size : l.columns - start;
}

// The words of one row's unit, 16 words apart, from its codes and back, four columns at a time.
FEWBIT_INLINE void put_unit(uint32_t* unit, int bits, const uint8_t* q) {
  uint32_t quad[8];
  __builtin_memcpy(quad, q, size_t(unit_columns(bits)));
  if (bits == 3) {
    uint32_t low[2] = {}, top = 0;
    for (int j = 0; j < 8; ++j) {
      low[j / 4] |= (quad[j] & 0x03030303u) << 2 * (j % 4);
      top |= (quad[j] >> 2 & 0x01010101u) << j;
    }
    unit[0] = low[0];
    unit[panel_rows] = low[1];
    unit[2 * panel_rows] = top;
  } else {
    uint32_t word = 0;
    for (int j = 0; j < 8 / bits; ++j) word |= quad[j] << bits * j;
    unit[0] = word;
  }
}

FEWBIT_INLINE void get_unit(const uint32_t* unit, int bits, uint8_t* q) {
  uint32_t quad[8];
  if (bits == 3) {
    for (int j = 0; j < 8; ++j)
      quad[j] = (unit[(j / 4) * panel_rows] >> 2 * (j % 4) & 0x03030303u) |
                (unit[2 * panel_rows] >> j & 0x01010101u) << 2;
  } else {
    for (int j = 0; j < 8 / bits; ++j)
      quad[j] = unit[0] >> bits * j & 0x01010101u * ((1u << bits) - 1u);
  }
  __builtin_memcpy(q, quad, size_t(unit_columns(bits)));
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
  // Codes of columns 4 j .. 4 j + 3 as the four bytes of every lane.
  FEWBIT_INLINE_MEMBER U32 quad(int j) const {
    if constexpr (bits == 8) {
      return w[0];
    } else if constexpr (bits == 3) {
      const U32 low = (w[j / 4] >> 2 * (j % 4)) & U32::set(0x03030303u);
      return low | (((w[2] >> j) & U32::set(0x01010101u)) << 2);
    } else {
      return (w[0] >> bits * j) & U32::set(0x01010101u * ((1u << bits) - 1u));
    }
  }
};

}  // namespace fewbit::cpu::FEWBIT_ISA
