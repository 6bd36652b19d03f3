// Quantisation: weights to unsigned codes, scales and zero points (grid.h).
#pragma once
#include "fewbit/grid.h"
#include "fewbit/kernel.h"

namespace fewbit {

struct Quantize {
  const void* w;        // [rows, columns] of dtype, row-major
  uint8_t* q;           // [rows, columns]
  float* scale;         // [rows, groups], already rounded to grid.scale_dtype
  uint8_t* zero_point;  // [rows, groups]
  DType dtype;
  int64_t rows;
  int64_t columns;
  int64_t group_size;  // 1..max(columns, 1)
  int64_t groups;
  Grid grid;
  bool stream;  // q is larger than the caches, and in whole lines

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return rows; }
};

FEWBIT_KERNEL(Quantize)

}  // namespace fewbit
