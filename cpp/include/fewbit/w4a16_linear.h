// out[m, n] = sum_k x[m, k] (q[n, k] - z[n, g]) s[n, g] + bias[n], g = group of k.
//
// Packed weights of 2, 3, 4 or 8 bits (layout.h) times float activations, float32 accumulation.
// Three regimes:
//   m <= fixed_rows   x in 24-bit fixed point per group, byte products (w8a8_linear.h); any m where
//                     the CPU multiplies tiles of bytes
//   m <= direct_rows  codes decoded to float in registers; scale and zero point are applied once
//                     per group: s (sum q x - z sum x)
//   more rows         a tile of weights is decoded once to (q - z) s in cache-resident scratch and
//                     multiplied by every block of rows
//
// For the float regimes activations come prepared (W4A16Prepare): float32, groups padded as in
// layout.h, rows in blocks of `block_rows` interleaved as [block][column][row].
#pragma once
#include "fewbit/dtype.h"
#include "fewbit/kernel.h"
#include "fewbit/layout.h"

namespace fewbit {

constexpr int64_t direct_rows = 24;  // most rows that take the in-register path

// Rows of one block: what the micro-kernels are compiled for, least padding first.
FEWBIT_ALWAYS_INLINE int64_t float_block_rows(int64_t m) {
  if (m <= direct_rows) return m <= 4 ? 4 : m <= 8 ? 8 : m <= 12 ? 12 : m <= 16 ? 16 : 24;
  const int64_t least = ceil_div(m, ceil_div(m, 14));
  return least <= 8 ? 8 : least <= 10 ? 10 : least <= 12 ? 12 : 14;
}

struct W4A16Prepare {
  const void* x;     // [m, columns] of dtype
  float* prepared;   // [blocks, padded_columns, block_rows], padding is 0
  float* group_sum;  // [m, groups]: sum of x over the group; null when m > direct_rows
  DType dtype;
  int64_t m;
  int64_t block_rows;
  PackedLayout layout;

  FEWBIT_ALWAYS_INLINE int64_t blocks() const { return ceil_div(m, block_rows); }
  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return blocks(); }
};

FEWBIT_KERNEL(W4A16Prepare)

struct W4A16Linear {
  const float* x;             // [blocks, padded_columns, block_rows] from W4A16Prepare
  const float* group_sum;     // [m, groups]; null when m > direct_rows
  const uint32_t* packed;     // [panels, units, unit_words, 16]
  const void* scale;          // [panels, groups, 16] of scale_dtype
  const uint8_t* zero_point;  // [panels, groups, 16]
  const float* bias;          // [rows]; or null
  float* sums;                // [panels, blocks * block_rows, 16] scratch; null when direct
  void* out;                  // [m, rows] of dtype
  DType dtype;
  DType scale_dtype;
  int64_t m;
  int64_t block_rows;
  int64_t strip;  // panels per task
  PackedLayout layout;

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return ceil_div(layout.panels(), strip); }
};

FEWBIT_KERNEL(W4A16Linear)

}  // namespace fewbit
