// Orthogonal transform of rows, y = (x s) (B (x) H_{2^k}) / sqrt(2^k), for a width n = m 2^k.
//
// H is Sylvester's matrix, done as k butterflies; B is an orthogonal m x m matrix. Where B is a
// Hadamard matrix over sqrt(m), its rows are taken four at a time: the 16 signed sums of four
// inputs are tabulated once, so that each of the m outputs needs m / 4 additions (the "four
// Russians": V. Arlazarov, E. Dinic, M. Kronrod, I. Faradzhev, 1970). Any other B is m
// multiply-adds an output. float32 throughout, scaled once at the end; the order of the sums
// depends on n only, so every instruction set gives the same bits.
#pragma once
#include "fewbit/dtype.h"
#include "fewbit/kernel.h"

namespace fewbit {

struct Hadamard {
  static constexpr int64_t max_width = 32768;
  static constexpr int64_t lanes = 16;  // 2^k below this: B is applied by multiply-adds
  static constexpr int64_t bundle = 4;  // rows of B per table

  const void* x;            // [rows, m 2^k] of dtype
  const float* signs;       // [m 2^k], s; null: all +1
  const uint8_t* patterns;  // [m, bundles]: bit i of (o, g) is set where B[4 g + i][o] < 0; or null
  const float* base;        // [m, m], B; null when m == 1 or patterns serve
  void* y;                  // [rows, m 2^k] of dtype; not x
  DType dtype;
  int64_t rows;
  int64_t m;
  int k;        // m 2^k <= max_width
  float scale;  // of the result: 1 / sqrt(2^k), over sqrt(m) with patterns

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return rows; }
  FEWBIT_ALWAYS_INLINE int64_t bundles() const { return (m + bundle - 1) / bundle; }
};

FEWBIT_KERNEL(Hadamard)

}  // namespace fewbit
