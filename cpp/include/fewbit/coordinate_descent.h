// Coordinate descent on codes: each code in turn to its best value given all others.
//
// With g = (w - w') H the error (w - w') H (w - w')^T of a row has its least value over column k at
//   t_k = w'_k + g_k / H_kk
// so w'_k becomes the point of its group's grid that is nearest to t_k, and g follows the change.
// No step can raise the error. A sweep visits every column once, in order; a code of an earlier
// column sees the later ones rounded, which GPTQ's single pass (gptq.h) cannot offer.
//
// Every g_k is one chain of fused multiply-adds over columns in order: neither block, threads nor
// instruction set change a bit.
#pragma once
#include "fewbit/dtype.h"
#include "fewbit/kernel.h"

namespace fewbit {

// Real: float or double, the type of g and H.
template <class Real>
struct CoordinateDescent {
  const void* w;              // [rows, columns] of dtype: what is approximated
  const Real* h;              // [columns, columns] symmetric, its diagonal above 0
  const float* scale;         // [rows, groups]
  const uint8_t* zero_point;  // [rows, groups]
  uint8_t* q;                 // [rows, columns] codes, changed in place
  Real* work;                 // [panels, work_columns(), 16]: g
  DType dtype;
  int64_t rows;
  int64_t columns;
  int64_t group_size;  // 1..max(columns, 1)
  int64_t groups;
  int64_t sweeps;
  int bits;

  static constexpr int64_t panel = 16;
  static constexpr int64_t task_panels = 16;
  static constexpr int64_t block = 128;   // columns between two updates of the others
  static constexpr int64_t padding = 16;  // columns that an update may touch behind the last
  FEWBIT_ALWAYS_INLINE int64_t work_columns() const { return columns + padding; }
  FEWBIT_ALWAYS_INLINE int64_t panels() const { return (rows + panel - 1) / panel; }
  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return (panels() + task_panels - 1) / task_panels; }
};

FEWBIT_KERNEL(CoordinateDescent<float>)
FEWBIT_KERNEL(CoordinateDescent<double>)

}  // namespace fewbit
