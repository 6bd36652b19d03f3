// Packed 4-bit weights times 4-bit activations, sums exact in int32:
//
//   out[m, n] = sx[m] sum_g s[n, g] sum_{k in g} a[m, k] (q[n, k] - z[n, g]) + bias[n]
//
// a in -7..7, one scale sx per token (quantize_per_token.h with 4 bits). Cards of sm_75 to sm_89
// multiply 4-bit numbers on tensor cores: words of eight codes of a, in the order of the packed
// layout's units, meet the weight's words as they are. Elsewhere, on CPUs and from sm_90 on, which
// has no such units, a is multiplied as int8 (w8a8_linear.h): that saves memory, not time.
#pragma once
#include "fewbit/kernel.h"
#include "fewbit/quantize_per_token.h"

namespace fewbit {

// Words of eight 4-bit codes to int8.
struct FoursOfWords {
  const uint32_t* words;  // [m, columns / 8]
  int8_t* q;              // [m, columns]
  int64_t m;
  int64_t columns;  // a multiple of 8

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return m; }
};

FEWBIT_KERNEL(FoursOfWords)

}  // namespace fewbit
