// Dequantisation: w = (q - z) s, in float32, rounded once to the output type.
#pragma once
#include "fewbit/dtype.h"
#include "fewbit/kernel.h"

namespace fewbit {

struct Dequantize {
  const uint8_t* q;           // [rows, columns]
  const float* scale;         // [rows, groups]
  const uint8_t* zero_point;  // [rows, groups]
  void* out;                  // [rows, columns] of dtype
  DType dtype;
  int64_t rows;
  int64_t columns;
  int64_t group_size;  // 1..max(columns, 1)
  int64_t groups;
  bool stream;  // out is larger than the caches, and in whole lines

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return rows; }
};

FEWBIT_KERNEL(Dequantize)

}  // namespace fewbit
