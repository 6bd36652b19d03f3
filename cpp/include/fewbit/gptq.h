// GPTQ: round the columns of a weight one after the other, each after the errors of the columns
// before it have been compensated.
//
// With H = X^T X = V V^T, V upper triangular, the output error of a row is
//   (w - w') H (w - w')^T = sum_k (V_kk (t_k - w'_k))^2,
//   t_k = w_k + sum_{j<k} (w_j - w'_j) C_jk,     C_jk = V_jk / V_kk
// so each column is rounded to the point of its grid that is nearest to t_k. This is the update of
// E. Frantar et al., GPTQ, 2022, eq. 2-3 (there with U = V^-1, the Cholesky factor of H^-1), in the
// form of LDLQ (J. Chee et al., QuIP, 2023, eq. 3), which needs no inverse of H or V. Backwards it
// is Babai's nearest plane algorithm (J. Chen et al., 2025): where no t_k leaves its grid, each
// term is at most (V_kk s / 2)^2.
//
// What successors change lies in the arguments. Any order of the columns may be solved: by falling
// H_kk (act-order; on grids fitted beforehand, so that groups stay in place), or so between groups
// and inside each. And w may be another weight than the layer's: with D = (X_float - X)^T X in
// solving order, X the inputs from the layers already quantised,
//   w (I + striu(D V^-T) V^-1)    GPTAQ (Y. Li et al., 2025, eq. 15)
//   w + w D H^-1                  Qronos (S. Zhang et al., 2025, prop. 3.1)
// are what to round for the float model's output X_float w^T.
//
// Columns are solved in blocks; the targets behind a block are updated once per block. Every t_k is
// one chain of fused multiply-adds over j in solving order, so neither block, threads nor
// instruction set change a bit. A group's grid (fewbit/grid.h) is fitted when its first column k is
// reached, to the weights a that are best given the columns solved so far; they follow from the
// same recurrence without rounding:  a_i = t_i + sum_{k<=j<i} (w_j - a_j) C_ji.
#pragma once
#include "fewbit/grid.h"
#include "fewbit/kernel.h"

namespace fewbit {

enum class GroupFit : int {
  in_order = 0,  // to the updated weights, when the group is reached: its columns must be adjacent
  before = 1,    // to the original weights, before the first column ("static groups")
  given = 2,     // scale and zero_point are inputs
};

// Real: float or double, the type of every t_k and a_i. In double the codes are those of the
// equations, but for targets within 1e-15 or so of halfway between two points; in float chains are
// about twice as fast.
template <class Real>
struct Gptq {
  const void* w;           // [rows, columns] of dtype, row-major
  const Real* c;           // [columns, columns] C in solving order; read above the diagonal only
  const Real* importance;  // [columns] weights of squared errors in the range search; null: 1
  const int64_t* order;    // [columns] the column solved k-th; null: left to right
  Real* work;              // [panels, work_columns(), 16]
  Real* group_work;        // [tasks, group_size, 16]
  uint8_t* q;              // [rows, columns], columns of w
  float* scale;            // [rows, groups], rounded to grid.scale_dtype
  uint8_t* zero_point;     // [rows, groups]
  DType dtype;
  int64_t rows;
  int64_t columns;
  int64_t group_size;  // 1..max(columns, 1)
  int64_t groups;
  int64_t block;   // columns between two updates of what follows, 1..max_block
  int64_t points;  // ranges tried per group: shrunk by 1 - 0.8 i / points; 0: the range
  GroupFit fit;
  Grid grid;

  static constexpr int64_t panel = 16;       // rows side by side in SIMD lanes
  static constexpr int64_t task_panels = 8;  // rows of one task: their block stays in L2
  static constexpr int64_t max_block = 256;
  static constexpr int64_t padding = 16;  // columns that an update may touch behind the last
  FEWBIT_ALWAYS_INLINE int64_t work_columns() const { return columns + padding; }
  FEWBIT_ALWAYS_INLINE int64_t panels() const { return (rows + panel - 1) / panel; }
  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return (panels() + task_panels - 1) / task_panels; }
};

FEWBIT_KERNEL(Gptq<float>)
FEWBIT_KERNEL(Gptq<double>)

}  // namespace fewbit
