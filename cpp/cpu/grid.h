// Fitting and applying the grid of one group; equation and rounding in fewbit/grid.h.
#pragma once
#include "fewbit/grid.h"
#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

struct Step {
  float s;  // scale
  float z;  // zero point, a whole number
  float qmax;
};

// A Step in lanes.
struct StepLanes {
  F32 s, z, qmax, inverse;
  FEWBIT_INLINE_MEMBER explicit StepLanes(const Step& g)
      : s(F32::set(g.s)),
        z(F32::set(g.z)),
        qmax(F32::set(g.qmax)),
        inverse(F32::set(inverse_of(g.s))) {}
};

// Rounds a positive scale to what the storage type can hold, never to 0 or infinity. Below 2^-14 a
// half loses precision quickly; rounding up there keeps the range of the codes.
FEWBIT_INLINE float round_scale(float s, DType type) {
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

FEWBIT_INLINE Step make_step(float lo, float hi, const Grid& grid) {
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

template <class T>
FEWBIT_INLINE Step fit(const T* w, int64_t n, const Grid& grid) {
  float lo = 0.0f, hi = 0.0f;
  int64_t i = 0;
  if (n >= 4 * F32::width) {
    F32 lo0 = F32::zero(), lo1 = lo0, hi0 = lo0, hi1 = lo0;  // two chains hide the latency
    for (; i + 2 * F32::width <= n; i += 2 * F32::width) {
      const F32 a = F32::load(w + i), b = F32::load(w + i + F32::width);
      lo0 = min(a, lo0);
      lo1 = min(b, lo1);
      hi0 = max(a, hi0);
      hi1 = max(b, hi1);
    }
    lo = reduce_min(min(lo0, lo1));
    hi = reduce_max(max(hi0, hi1));
  }
  for (; i < n; ++i) {
    const float v = to_float(w[i]);
    lo = v < lo ? v : lo;
    hi = v > hi ? v : hi;
  }
  return make_step(lo, hi, grid);
}

FEWBIT_INLINE F32 code(F32 w, const StepLanes& g) {
  return min(max(round_quotient(w, g.s, g.inverse) + g.z, F32::zero()), g.qmax);
}

FEWBIT_INLINE float code(float w, const Step& g) {
  const float q = round_even(w / g.s) + g.z;
  const float low = q > 0.0f ? q : 0.0f;  // a NaN becomes 0, in both forms
  return low < g.qmax ? low : g.qmax;
}

}  // namespace fewbit::cpu::FEWBIT_ISA
