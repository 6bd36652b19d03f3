// The grid of one group of weights, shared by quantize and pseudo_quantize.
//
//   lo = min(0, min w)   hi = max(0, max w)          the range always holds 0
//   asymmetric:  s = (hi - lo) / (2^b - 1)           z = clamp(round(-lo / s), 0, 2^b - 1)
//   symmetric:   s = 2 max(-lo, hi) / (2^b - 1)      z = 2^(b-1)
//   q = clamp(round(w / s) + z, 0, 2^b - 1)          w' = (q - z) s
//
// s is rounded to the type it will be stored in before z and q are computed, so storing it loses
// nothing. A group without range (all zero) has s = 1 and q = z. Rounds half to even and divides
// by s, as torch does: CPU results equal python/fewbit/reference.py bit for bit. Computed in
// float32. The symmetric step is 2 max|w| / (2^b - 1), not max|w| / (2^(b-1) - 1): all 2^b codes
// are used and no weight is further than s / 2 from its grid point.
#pragma once
#include "fewbit/dtype.h"

namespace fewbit {

struct Grid {
  int bits;  // b, 2..8
  bool symmetric;
  DType scale_dtype;  // what s is rounded to
};

}  // namespace fewbit
