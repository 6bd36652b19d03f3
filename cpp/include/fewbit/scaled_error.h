// What the grid (grid.h) leaves of weights whose columns were scaled first, for several scales:
//
//   error[i] = Q(w diag(s_i)) diag(s_i)^-1 - w
//
// AWQ's search (arXiv 2306.00978, eq. 4) measures it for every candidate s_i. Multiplied, divided
// and subtracted in float32 and rounded to the type of w once.
#pragma once
#include "fewbit/grid.h"
#include "fewbit/kernel.h"

namespace fewbit {

struct ScaledError {
  const void* w;       // [rows, columns] of dtype, row-major
  const float* scale;  // [count, columns]
  void* error;         // [count, rows, columns] of dtype
  DType dtype;
  int64_t count;
  int64_t rows;
  int64_t columns;
  int64_t group_size;  // 1..max(columns, 1); the last group of a row may be short
  Grid grid;

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return rows; }
};

FEWBIT_KERNEL(ScaledError)

}  // namespace fewbit
