// Activation statistics per input channel, added to what earlier batches left:
//
//   sum_abs[k] += sum_t |x[t, k]|        max_abs[k] = max(max_abs[k], max_t |x[t, k]|)
//
// Sums run over tokens in order, in float64, one chain per channel: the result does not depend on
// threads or on how tokens were batched. A NaN in x makes both entries NaN.
#pragma once
#include "fewbit/dtype.h"
#include "fewbit/kernel.h"

namespace fewbit {

struct ActStats {
  const void* x;    // [tokens, channels] of dtype, row-major
  double* sum_abs;  // [channels]
  float* max_abs;   // [channels]
  DType dtype;
  int64_t tokens;
  int64_t channels;

  static constexpr int64_t block = 512;  // channels per task; neighbours are read as one
  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return (channels + block - 1) / block; }
};

FEWBIT_KERNEL(ActStats)

}  // namespace fewbit
