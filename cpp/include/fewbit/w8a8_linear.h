// Packed integer weights times integer activations, sums exact in int32:
//
//   out[m, n] = sum_g s[n, g] sx[m] sum_{k in g} (q[n, k] - z[n, g]) (a[m, k] - za[m]) + bias[n]
//
// q are packed codes of 2, 3, 4 or 8 bits (layout.h), a int8 codes with one scale per token. The
// sum over a group is sum q a - z sum a - za sum (q - z): byte products, the sum of a and the sum
// of centred codes. It is exact while columns <= max_columns, rounded once to float32; groups are
// added in float32, in order.
//
// The same kernel serves float activations with few rows (w4a16_linear): x is written as a 24-bit
// fixed-point number v sx, sx a power of two of each group and row, |x - v sx| <= 2^-23 max |x|,
// and v as digits that fit the byte products. A group with a NaN or an infinity has sx = NaN.
//
// Digits: v = sum_d base^d digit_d. Where byte products are summed in 16 bits, codes of 8 bits
// need |digit| <= 8 (base 16); everything else uses base 256, -128 <= digit <= 127.
//
// Where the CPU multiplies tiles (AMX; cpp/cpu/tiles.h) more rows than a few go that way: 16 rows
// of 64 columns a tile, digits in tiles side by side, [steps, tiles, digits or 16 rows, 16, 64].
#pragma once
#include "fewbit/dtype.h"
#include "fewbit/int8_mixed_linear.h"
#include "fewbit/kernel.h"
#include "fewbit/layout.h"

namespace fewbit {

constexpr int64_t fixed_rows = 2;  // most rows that w4a16_linear runs on digits without tiles
constexpr int64_t max_digits = 6;
constexpr int64_t tile_lefts = 3;          // of a step: the digits of float x, or most codes
constexpr int64_t integer_block_rows = 8;  // most rows of one step
constexpr int64_t max_columns = 1 << 16;   // 255 * 128 * 2^16 < 2^31

// Rows of one step: 1, 2, 4 or 8; with tiles 16, and for codes up to three times as many.
FEWBIT_ALWAYS_INLINE int64_t integer_rows(int64_t m, bool tiles, bool codes) {
  if (!tiles) return m <= 2 ? m : m <= 4 ? 4 : integer_block_rows;
  const int64_t all = ceil_div(m, tile_rows);
  return codes ? tile_rows * ceil_div(all, ceil_div(all, tile_lefts)) : tile_rows;
}
FEWBIT_ALWAYS_INLINE bool in_tiles(int64_t block_rows) { return block_rows >= tile_rows; }

struct Digits {
  const void* x;  // [m, columns]: float of dtype, or int8 codes
  uint32_t* out;  // [blocks, padded_columns / 4, block_rows, digits], 4 columns each; or in tiles
  float* scale;   // [m, groups], written for float x; unused for codes
  void* sum;      // [m, groups]: sum of v over the group, float for float x, int32 for codes
  bool codes;
  DType dtype;
  int64_t m;
  int64_t block_rows;
  PackedLayout layout;

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return ceil_div(m, block_rows) * block_rows; }
};

FEWBIT_DOT_KERNEL(Digits)

struct W8A8Linear {
  const uint32_t* x;        // from Digits
  const float* x_scale;     // [m, groups] from Digits; [m] for codes
  const void* x_sum;        // [m, groups] from Digits
  const int32_t* x_zero;    // [m]: za; or null for 0 and for float x
  const int32_t* code_sum;  // [panels, groups, 16]: sum of q - z; null when x_zero is
  bool codes;
  const uint32_t* packed;     // [panels, units, unit_words, 16]
  const void* scale;          // [panels, groups, 16] of scale_dtype
  const uint8_t* zero_point;  // [panels, groups, 16]
  const float* bias;          // [rows]; or null
  uint8_t* decoded;           // [tasks, 2, tiles, tile_bytes] scratch; null without tiles, and
                              // where 8-bit codes of whole tiles are read as they lie
  // The float part of LLM.int8(), added to the product; or null. Run by the first tile of a panel
  // and a chunk of rows, which has just read the panel's codes: the outlier columns are far apart,
  // and each would be a miss.
  const OutlierProduct* outliers;
  Kernel<OutlierProduct> outlier_product;
  void* out;  // [m, rows] of dtype
  DType dtype;
  DType scale_dtype;
  int64_t m;
  int64_t block_rows;
  int64_t strip;  // panels per task
  PackedLayout layout;

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return ceil_div(layout.panels(), strip); }
};

FEWBIT_DOT_KERNEL(W8A8Linear)

}  // namespace fewbit
