// RMSNorm or LayerNorm and the quantisation of its result (quantize_per_token.h) in one pass:
//
//   rms:    y = x / sqrt(mean x^2 + eps) * weight
//   layer:  y = (x - mean x) / sqrt(mean (x - mean x)^2 + eps) * weight + bias
//
// float32 throughout; the norm's result is not rounded to the type of x in between.
#pragma once
#include "fewbit/dtype.h"
#include "fewbit/kernel.h"

namespace fewbit {

struct NormQuantize {
  const void* x;        // [m, columns] of dtype, row-major
  const float* weight;  // [columns]
  const float* bias;    // [columns]; or null
  float* y;             // [m, columns] scratch
  int8_t* q;            // [m, columns]
  float* scale;         // [m]
  int32_t* zero_point;  // [m]
  float eps;
  DType dtype;
  bool rms;
  bool symmetric;
  int64_t m;
  int64_t columns;

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return m; }
};

FEWBIT_KERNEL(NormQuantize)

}  // namespace fewbit
