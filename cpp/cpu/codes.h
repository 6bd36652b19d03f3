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
  // From its codes, quads[j] those of columns 4 j .. 4 j + 3 as the four bytes of every lane.
  FEWBIT_INLINE_MEMBER static UnitRows of(const U32* quads) {
    UnitRows u;
    for (int i = 0; i < words; ++i) u.w[i] = U32::zero();
    for (int j = 0; j < columns / 4; ++j) {
      if constexpr (bits == 3) {
        u.w[j / 4] = u.w[j / 4] | ((quads[j] & U32::set(0x03030303u)) << 2 * (j % 4));
        u.w[2] = u.w[2] | (((quads[j] >> 2) & U32::set(0x01010101u)) << j);
      } else {
        u.w[0] = u.w[0] | (quads[j] << bits * j);
      }
    }
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
  // The inverse of `of`.
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

// A tile is what moves between rows and lanes at a time: a cache line of codes of F32::width rows,
// `stride` bytes apart, as whole units.
template <int bits>
constexpr int tile_units = tile_columns / UnitRows<bits>::columns;

// Also ors the codes into the bytes of `all`.
template <int bits>
FEWBIT_INLINE void load_tile(const uint8_t* q, int64_t stride,
                             UnitRows<bits> (&unit)[tile_units<bits>], U32& all) {
  using Unit = UnitRows<bits>;
  const auto load = [&](int row, int column) {
    const U32 codes = load_u32((const uint32_t*)(q + row * stride + column));
    all = all | codes;
    return codes;
  };
#if FEWBIT_ISA_LEVEL >= 1
  if constexpr (bits == 4) {  // half as many words change places as there are quads
    constexpr int half = F32::width / 2;
    for (int u = 0; u < tile_units<bits>; u += half) {
      U32 square[half];
      for (int i = 0; i < half; ++i)
        square[i] = merge(load(2 * i, u * Unit::columns), load(2 * i + 1, u * Unit::columns));
      transpose(square);
      for (int i = 0; i < half; ++i) unit[u + i].w[0] = square[i];
    }
    return;
  }
#endif
  U32 quads[tile_columns / 4];
  for (int j = 0; j < tile_columns / 4; j += F32::width) {
    U32 square[F32::width];
    for (int i = 0; i < F32::width; ++i) square[i] = load(i, 4 * j);
    transpose(square);
    for (int i = 0; i < F32::width; ++i) quads[j + i] = square[i];
  }
  for (int u = 0; u < tile_units<bits>; ++u) unit[u] = Unit::of(quads + u * (Unit::columns / 4));
}
template <int bits>
FEWBIT_INLINE void store_tile(const UnitRows<bits> (&unit)[tile_units<bits>], uint8_t* q,
                              int64_t stride) {
  using Unit = UnitRows<bits>;
  const auto store = [&](U32 codes, int row, int column) {
    codes.store((uint32_t*)(q + row * stride + column));
  };
#if FEWBIT_ISA_LEVEL >= 1
  if constexpr (bits == 4) {
    constexpr int half = F32::width / 2;
    for (int u = 0; u < tile_units<bits>; u += half) {
      U32 square[half];
      for (int i = 0; i < half; ++i) square[i] = unit[u + i].w[0];
      transpose(square);
      for (int i = 0; i < half; ++i) {
        U32 a, b;
        split(square[i], a, b);
        store(a, 2 * i, u * Unit::columns);
        store(b, 2 * i + 1, u * Unit::columns);
      }
    }
    return;
  }
#endif
  constexpr int quads = Unit::columns / 4;
  for (int j = 0; j < tile_columns / 4; j += F32::width) {
    U32 square[F32::width];
    for (int i = 0; i < F32::width; ++i) square[i] = unit[(j + i) / quads].quad((j + i) % quads);
    transpose(square);
    for (int i = 0; i < F32::width; ++i) store(square[i], i, 4 * j);
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
