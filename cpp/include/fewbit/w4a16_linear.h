// out[m, n] = sum_k x[m, k] (q[n, k] - z[n, g]) s[n, g] + bias[n], g = group of k.
//
// Packed weights of 2, 3, 4 or 8 bits (layout.h) times float activations, float32 accumulation.
// Two regimes. Few rows (m <= direct_rows): codes are decoded in registers, and scale and zero
// point are applied once per group: s (sum q x - z sum x). More rows: a tile of weights is decoded
// to float once into cache-resident scratch and multiplied by every block of rows.
//
// The activations come prepared (W4A16Prepare): float32, groups padded as in layout.h, rows in
// blocks of `block_rows` interleaved as [block][column][row].
#pragma once
#include "fewbit/dtype.h"
#include "fewbit/kernel.h"
#include "fewbit/layout.h"

namespace fewbit {

constexpr int64_t direct_rows = 4;     // most rows that take the in-register path
constexpr int64_t max_block_rows = 12; // rows of one micro-kernel step

struct W4A16Prepare {
  const void* x;         // [m, columns] of dtype
  float* prepared;       // [blocks, padded_columns, block_rows], padding is 0
  float* group_sum;      // [m, groups]: sum of x over the group; null when m > direct_rows
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
  float* sums;                // [panels, m, 16] scratch; null when m <= direct_rows
  void* out;                  // [m, rows] of dtype
  DType dtype;
  DType scale_dtype;
  int64_t m;
  int64_t block_rows;
  int64_t strip;              // panels per task
  PackedLayout layout;

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return ceil_div(layout.panels(), strip); }
};

FEWBIT_KERNEL(W4A16Linear)

}  // namespace fewbit
