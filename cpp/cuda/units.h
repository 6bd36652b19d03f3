// Units of the packed layout (fewbit/layout.h) in registers, four codes of a quad at a time.
#pragma once
#include "device.h"
#include "fewbit/layout.h"

namespace fewbit::cuda {

// Columns [start, start + n) of a row lie in unit u; n is short at the end of a group.
struct UnitSpan {
  int64_t start, n;
};
FEWBIT_ALWAYS_INLINE UnitSpan unit_span(const PackedLayout& l, int64_t u) {
  const int64_t group = u / l.group_units();
  const int64_t first = (u - group * l.group_units()) * unit_columns(l.bits);
  const int64_t start = group * l.group_size + first;
  const int64_t left = l.group_size - first, rest = l.columns - start;
  const int64_t n = left < rest ? left : rest;
  return {start, n < unit_columns(l.bits) ? n : unit_columns(l.bits)};
}

// Whether every unit is whole, and rows of single bytes at p can be accessed by units.
template <int bits>
FEWBIT_DEVICE bool whole_units(const PackedLayout& l, const void* p) {
  constexpr int columns = int(unit_columns(bits)), access = columns < 16 ? columns : 16;
  return l.group_size % columns == 0 && l.columns % columns == 0 &&
         reinterpret_cast<uintptr_t>(p) % access == 0;
}
// A unit's codes at p, a byte each, as quads; and the reverse.
template <int bits>
FEWBIT_DEVICE void load_quads(const uint8_t* p, uint32_t (&quad)[unit_columns(bits) / 4]) {
  constexpr int quads = int(unit_columns(bits)) / 4, access = quads < 4 ? quads : 4;
#pragma unroll
  for (int i = 0; i < quads; i += access) {
    const auto part = load<access>(reinterpret_cast<const uint32_t*>(p) + i);
#pragma unroll
    for (int j = 0; j < access; ++j) quad[i + j] = part.v[j];
  }
}
template <int bits>
FEWBIT_DEVICE void store_quads(const uint32_t (&quad)[unit_columns(bits) / 4], uint8_t* p) {
  constexpr int quads = int(unit_columns(bits)) / 4, access = quads < 4 ? quads : 4;
#pragma unroll
  for (int i = 0; i < quads; i += access) {
    Vector<uint32_t, access> part;
#pragma unroll
    for (int j = 0; j < access; ++j) part.v[j] = quad[i + j];
    store(reinterpret_cast<uint32_t*>(p) + i, part);
  }
}

FEWBIT_DEVICE float load_scale(const void* scale, DType type, int64_t index) {
  if (type == DType::f32) return static_cast<const float*>(scale)[index];
  if (type == DType::f16) return to_float(static_cast<const Half*>(scale)[index]);
  return to_float(static_cast<const BFloat16*>(scale)[index]);
}

template <int bits>
FEWBIT_ALWAYS_INLINE uint32_t code_mask() {
  return 0x01010101u * ((1u << bits) - 1u);
}

// Codes of columns 4 j .. 4 j + 3 of the unit in `word`, one per byte.
template <int bits>
FEWBIT_ALWAYS_INLINE uint32_t quad_of(const uint32_t* word, int j) {
  if constexpr (bits == 3)
    return (word[j / 4] >> 2 * (j % 4) & 0x03030303u) | (word[2] >> j & 0x01010101u) << 2;
  else if constexpr (bits == 8)
    return word[0];
  else
    return word[0] >> bits * j & code_mask<bits>();
}

// The reverse; the unit's words lie 16 words apart.
template <int bits>
FEWBIT_ALWAYS_INLINE void put_quads(const uint32_t* quad, uint32_t* unit) {
  if constexpr (bits == 3) {
    uint32_t low[2] = {0, 0}, top = 0;
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
}  // namespace fewbit::cuda
