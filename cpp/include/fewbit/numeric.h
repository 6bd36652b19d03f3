// Scalar conversions and rounding, the same bits on every CPU and in CUDA kernels (but for those of
// a NaN, which cards do not keep).
#pragma once
#include "fewbit/dtype.h"

namespace fewbit {

FEWBIT_ALWAYS_INLINE uint32_t bits_of(float v) { return __builtin_bit_cast(uint32_t, v); }
FEWBIT_ALWAYS_INLINE float float_of(uint32_t u) { return __builtin_bit_cast(float, u); }

FEWBIT_ALWAYS_INLINE float to_float(float v) { return v; }
FEWBIT_ALWAYS_INLINE float to_float(BFloat16 v) { return float_of(uint32_t(v.bits) << 16); }
FEWBIT_ALWAYS_INLINE float to_float(Half v) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
#else
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, rest = v.bits & 0x7FFFu;
  // Subnormals: scaling the integer is exact. Inf and NaN: exponent 255, payload kept.
  if (rest < 0x0400u) return float_of(bits_of(float(rest) * 0x1p-24f) | sign);
  if (rest >= 0x7C00u) return float_of(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
  return float_of(sign | ((rest << 13) + 0x38000000u));
#endif
}

FEWBIT_ALWAYS_INLINE void from_float(float v, float* out) { *out = v; }
FEWBIT_ALWAYS_INLINE void from_float(float v, BFloat16* out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(v));
#else
  const uint32_t u = bits_of(v);
  // Round half to even on the 16 dropped bits; a NaN keeps a set quiet bit.
  out->bits =
      v != v ? uint16_t((u >> 16) | 0x40u) : uint16_t((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
#endif
}
FEWBIT_ALWAYS_INLINE void from_float(float v, Half* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(v));
#else
  const uint32_t u = bits_of(v), sign = (u >> 16) & 0x8000u, rest = u & 0x7FFFFFFFu;
  if (rest > 0x7F800000u) {
    out->bits = uint16_t(sign | 0x7E00u | ((rest >> 13) & 0x1FFu));
    return;
  }
  if (rest >= 0x477FF000u) {
    out->bits = uint16_t(sign | 0x7C00u);
    return;
  }  // 65520 and up
  if (rest < 0x38800000u) {  // below 2^-14: the result is a multiple of 2^-24
    // Adding 0.5 puts the ulp at 2^-24, so the hardware rounds half to even there.
    out->bits = uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - 0x3F000000u));
    return;
  }
  out->bits = uint16_t(sign | ((rest - 0x38000000u + 0xFFFu + ((rest >> 13) & 1u)) >> 13));
#endif
}

FEWBIT_ALWAYS_INLINE float round_even(float v) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("cvt.rni.f32.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#else
  return __builtin_nearbyintf(v);
#endif
}
// clamp(round(v / s) + z, low, high); a NaN becomes low.
FEWBIT_ALWAYS_INLINE float code_of(float v, float s, float z, float low, float high) {
  const float q = round_even(v / s) + z;
  const float up = q > low ? q : low;
  return up < high ? up : high;
}
FEWBIT_ALWAYS_INLINE float abs_of(float v) { return float_of(bits_of(v) & 0x7FFFFFFFu); }

}  // namespace fewbit
