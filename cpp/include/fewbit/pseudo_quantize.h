// Pseudo-quantisation: put every weight on its grid (grid.h) and bring it back to float.
#pragma once
#include "fewbit/grid.h"
#include "fewbit/kernel.h"

namespace fewbit {

struct PseudoQuantize {
  const void* w;  // [rows, columns] of dtype, row-major
  void* out;      // [rows, columns] of dtype; may be w itself
  DType dtype;
  int64_t rows;
  int64_t columns;
  int64_t group_size;  // 1..max(columns, 1); the last group of a row may be short
  Grid grid;
  bool stream;  // out is larger than the caches, and in whole lines

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return rows; }
};

FEWBIT_KERNEL(PseudoQuantize)

}  // namespace fewbit
