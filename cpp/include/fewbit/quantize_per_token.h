// Activations to int8, one scale per token (row):
//
//   symmetric:   s = max |x| / 127          z = 0                             q in -127..127
//   asymmetric:  s = (hi - lo) / 255        z = clamp(round(-128 - lo / s))   q in -128..127
//   static:      s and z are given
//   q = clamp(round(x / s) + z)             x' = (q - z) s
//
// lo = min(0, min x) and hi = max(0, max x). Rounds half to even and divides by s: CPU results
// equal python/fewbit/reference.py bit for bit. A row of zeros has s = 1. A row with a NaN or an
// infinity has s = NaN and the least code, so that what is computed from it is NaN. Columns marked
// in `skip` (LLM.int8()'s outliers, arXiv 2208.07339) count as 0 in range and codes.
#pragma once
#include "fewbit/dtype.h"
#include "fewbit/kernel.h"

namespace fewbit {

struct QuantizePerToken {
  const void* x;              // [m, columns] of dtype, row-major
  const uint8_t* skip;        // [columns]; or null
  const float* fixed_scale;   // one scale for all rows; or null: dynamic
  const int32_t* fixed_zero;  // one zero point; or null
  int8_t* q;                  // [m, columns]
  float* scale;               // [m]
  int32_t* zero_point;        // [m]
  DType dtype;
  bool symmetric;
  int64_t m;
  int64_t columns;

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return m; }
};

FEWBIT_KERNEL(QuantizePerToken)

}  // namespace fewbit
