// The packed layout that the matrix kernels read.
//
// Rows (output channels) are cut into panels of 16, one SIMD lane per row. Along K every group
// starts on a unit boundary: a group of `group_size` columns takes group_size rounded up to a
// whole number of units, the padding codes are 0 and meet activations that are 0. A unit is the
// least number of columns that fills whole 32-bit words:
//
//   bits  columns/unit  words/unit     bits  columns/unit  words/unit
//     2        16           1            4         8           1
//     3        32           3            8         4           1
//
// packed[panel][unit][word][row 0..15] is one uint32 each. In a word of 2, 4 or 8 bits, column i
// of the unit sits at bits 8 * (i % 4) + bits * (i / 4): one shift and one mask give the codes of
// four columns as bytes (integer kernels) or of one column in every lane (float kernels).
//
//   4 bits:   byte 3    byte 2    byte 1    byte 0
//            [k7|k3]   [k6|k2]   [k5|k1]   [k4|k0]        high nibble | low nibble
//
// 3 bits are two planes: words 0 and 1 hold the low 2 bits of columns 0..15 and 16..31 as above,
// word 2 the top bit of all 32 (column i at bit 8 * (i % 4) + i / 4).
//
// Scales and zero points follow the panels: [panel][group][row 0..15]. Rows past out_features have
// codes, scales and zero points 0.
#pragma once
#include <cstdint>

#include "fewbit/dtype.h"

namespace fewbit {

constexpr int64_t panel_rows = 16;

// What matrix units multiply: 16 rows of 64 bytes.
constexpr int64_t tile_rows = 16;
constexpr int64_t tile_columns = 64;
constexpr int64_t tile_bytes = tile_rows * tile_columns;

FEWBIT_ALWAYS_INLINE int64_t unit_columns(int bits) { return bits == 3 ? 32 : 32 / bits; }
FEWBIT_ALWAYS_INLINE int64_t unit_words(int bits) { return bits == 3 ? 3 : 1; }
FEWBIT_ALWAYS_INLINE bool packable(int64_t bits) {
  return bits == 2 || bits == 3 || bits == 4 || bits == 8;
}

FEWBIT_ALWAYS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct PackedLayout {
  int64_t rows;        // N, output channels
  int64_t columns;     // K, input channels
  int64_t group_size;  // columns per group, 1..max(K, 1)
  int bits;

  FEWBIT_ALWAYS_INLINE int64_t panels() const { return ceil_div(rows, panel_rows); }
  FEWBIT_ALWAYS_INLINE int64_t groups() const { return ceil_div(columns, group_size); }
  FEWBIT_ALWAYS_INLINE int64_t group_units() const {
    return ceil_div(group_size, unit_columns(bits));
  }
  // Units of the last group, which may be short.
  FEWBIT_ALWAYS_INLINE int64_t last_units() const {
    return ceil_div(columns - (groups() - 1) * group_size, unit_columns(bits));
  }
  FEWBIT_ALWAYS_INLINE int64_t units() const {
    return groups() == 0 ? 0 : (groups() - 1) * group_units() + last_units();
  }
  FEWBIT_ALWAYS_INLINE int64_t padded_columns() const { return units() * unit_columns(bits); }
  FEWBIT_ALWAYS_INLINE int64_t panel_words() const {
    return units() * unit_words(bits) * panel_rows;
  }
  FEWBIT_ALWAYS_INLINE int64_t words() const { return panels() * panel_words(); }
  // Tiles along K where every group starts on one (cpp/cpu/tiles.h).
  FEWBIT_ALWAYS_INLINE int64_t group_tiles() const {
    return ceil_div(group_units() * unit_columns(bits), tile_columns);
  }
  FEWBIT_ALWAYS_INLINE int64_t tiles() const {
    return groups() == 0 ? 0
                         : (groups() - 1) * group_tiles() +
                               ceil_div(last_units() * unit_columns(bits), tile_columns);
  }
};

}  // namespace fewbit
