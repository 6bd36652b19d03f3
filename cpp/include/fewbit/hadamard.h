// Orthogonal transform of rows, y = (x s) (B_1 (x) B_2 (x) .. (x) H_{2^k}) / sqrt(2^k), for a width
// n = m_1 m_2 .. 2^k.
//
// H is Sylvester's matrix, done as k butterflies; each B is an orthogonal m x m matrix. Where B is
// a Hadamard matrix over sqrt(m), its rows are taken four at a time: the eight sums of four inputs
// that add the first are tabulated once, so that each of the m outputs is m / 4 of them, added or
// subtracted (the "four Russians": V. Arlazarov, E. Dinic, M. Kronrod, I. Faradzhev, 1970). A
// matrix of Paley's second kind is C (x) [1 1; 1 -1] - 2 I (x) [0 1; 1 0] with C of half its order:
// both halves of a pair go through the same C, m / 8 additions an output. Any other B is m
// multiply-adds an output; one of odd order that reversing rows and columns 1 .. m - 1 leaves as it
// is, as Hartley's, half as many: sums x_i + x_{m-i} and differences go each through a matrix of
// half the order. float32 throughout, scaled once at the end; the order of the sums depends on n
// and the bases only, so every instruction set gives the same bits.
#pragma once
#include "fewbit/dtype.h"
#include "fewbit/kernel.h"
#include "fewbit/layout.h"

namespace fewbit {

struct HadamardBase {
  static constexpr int64_t bundle = 4;         // rows of B to a table
  static constexpr int64_t table = 8;          // sums: bit i of a number, input i + 1 is subtracted
  static constexpr int64_t most_bundles = 28;  // of a step: tables of 32 columns take 28 KiB
  static constexpr int64_t max_tables = 1024;  // largest m with tables

  int64_t m;
  bool paired;  // of Paley's second kind; the tables serve C

  // With tables: the outputs of a step by how many sums they add, and their terms, 8 times the
  // bundle in the step and the sum, those that are added first. So a subtraction costs what an
  // addition does, and no output needs a choice of its own.
  const uint8_t* terms;    // [bundles, order]; null: no tables
  const uint16_t* places;  // [steps, order]: which output
  const uint8_t* added;    // [steps, order]: how many terms

  const float* products;  // [m, m], B, where terms is null
  const float* halves;    // [2, half, half]: (B[i][o] +- B[m - i][o]) / 2; null without symmetry

  FEWBIT_ALWAYS_INLINE int64_t order() const { return paired ? m / 2 : m; }
  FEWBIT_ALWAYS_INLINE int64_t half() const { return (m + 1) / 2; }
  FEWBIT_ALWAYS_INLINE int64_t bundles() const { return ceil_div(order(), bundle); }
  FEWBIT_ALWAYS_INLINE int64_t steps() const { return ceil_div(bundles(), most_bundles); }
  FEWBIT_ALWAYS_INLINE int64_t step_bundles() const { return ceil_div(bundles(), steps()); }
};

struct Hadamard {
  static constexpr int64_t max_width = 32768;

  const void* x;              // [rows, width] of dtype
  const float* signs;         // [width], s; null: all +1
  const HadamardBase* bases;  // [count], B_1 first
  int64_t count;
  void* y;  // [rows, width] of dtype; not x
  DType dtype;
  int64_t rows;
  int64_t width;  // at most max_width
  int k;
  float scale;  // of the result: 1 / sqrt(2^k), over sqrt(m) of each base of +1 and -1
  bool past;    // write y past the caches

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return rows; }
};

FEWBIT_KERNEL(Hadamard)

}  // namespace fewbit
