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
#include "fewbit/numeric.h"

namespace fewbit {

struct Grid {
  int bits;  // b, 2..8
  bool symmetric;
  DType scale_dtype;  // what s is rounded to
};

struct Step {
  float s;  // scale
  float z;  // zero point, a whole number
  float qmax;
};

// Rounds a positive scale to what the storage type can hold, never to 0 or infinity. Below 2^-14 a
// half loses precision quickly; rounding up there keeps the range of the codes.
FEWBIT_ALWAYS_INLINE float round_scale(float s, DType type) {
  if (type == DType::f16) {
    if (s < 0x1p-14f) {
      const float n = s * 0x1p24f;  // exact
      const float up = round_even(n) < n ? round_even(n) + 1.0f : round_even(n);
      return up * 0x1p-24f;
    }
    if (s > 65504.0f) return 65504.0f;
    Half h;
    from_float(s, &h);
    return to_float(h);
  }
  if (type == DType::bf16) {
    if (s > 3.3895314e38f) return float_of(0x7F7F0000u);  // largest finite
    BFloat16 b;
    from_float(s, &b);
    return to_float(b);
  }
  return s;
}

FEWBIT_ALWAYS_INLINE Step make_step(float lo, float hi, const Grid& grid) {
  const float qmax = float((1 << grid.bits) - 1);
  const float half = float(1 << (grid.bits - 1));
  if (grid.symmetric) {
    hi = -lo > hi ? -lo : hi;
    lo = -hi;
  }
  const float range = hi - lo;
  if (!(range > 0.0f)) return {1.0f, grid.symmetric ? half : 0.0f, qmax};
  // Two divisions where the range itself overflows.
  float s = range <= 3.4028235e38f ? range / qmax : hi / qmax - lo / qmax;
  s = s < 0x1p-126f ? 0x1p-126f : s;  // the least normal number: division by s stays finite
  s = round_scale(s, grid.scale_dtype);
  if (grid.symmetric) return {s, half, qmax};
  float z = round_even(-lo / s);
  z = z > 0.0f ? (z < qmax ? z : qmax) : 0.0f;  // a NaN (infinite weights) becomes 0
  return {s, z, qmax};
}

FEWBIT_ALWAYS_INLINE float code(float w, const Step& g) {
  return code_of(w, g.s, g.z, 0.0f, g.qmax);
}

}  // namespace fewbit
