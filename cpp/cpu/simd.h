// The whole SIMD vocabulary of the CPU kernels: F32, I32, U32 (32-bit lanes), F64 and Dot (sums of
// byte products), one branch per instruction set. Kernels are written once against it. Included by
// kernel files only, which are compiled once per ISA with FEWBIT_ISA naming their namespace;
// nothing here may be shared between ISAs, so everything lives in that namespace and no std::
// inline function is used.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "fewbit/numeric.h"

#if FEWBIT_ISA_LEVEL >= 1
#include <immintrin.h>
#endif

#define FEWBIT_INLINE static inline __attribute__((always_inline))
#define FEWBIT_INLINE_MEMBER inline __attribute__((always_inline))
// Before a loop over the columns of a unit: with lanes, its shifts must become constants.
#if FEWBIT_ISA_LEVEL >= 1
#define FEWBIT_UNROLL _Pragma("GCC unroll 32")
#else
#define FEWBIT_UNROLL
#endif

namespace fewbit::cpu::FEWBIT_ISA {

using fewbit::to_float;  // beside the one for lanes

// max_abs of lanes, below, of two numbers.
FEWBIT_INLINE float max_abs(float a, float b) {
  const float v = abs_of(b);
  return int32_t(bits_of(v)) > int32_t(bits_of(a)) ? v : a;
}

// ---- float32 and uint32 lanes ------------------------------------------------------------------

#if FEWBIT_ISA_LEVEL >= 2  // AVX-512 F, BW, DQ, VL; 3 adds VNNI, 4 AMX (tiles.h)

struct U32 {
  __m512i v;
  FEWBIT_INLINE_MEMBER static U32 zero() { return {_mm512_setzero_si512()}; }
  FEWBIT_INLINE_MEMBER static U32 set(uint32_t a) { return {_mm512_set1_epi32(int(a))}; }
  FEWBIT_INLINE_MEMBER void store(uint32_t* p) const { _mm512_storeu_si512(p, v); }
};

struct F32 {
  static constexpr int width = 16;
  __m512 v;

  FEWBIT_INLINE_MEMBER static F32 set(float a) { return {_mm512_set1_ps(a)}; }
  FEWBIT_INLINE_MEMBER static F32 zero() { return {_mm512_setzero_ps()}; }
  FEWBIT_INLINE_MEMBER static F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  FEWBIT_INLINE_MEMBER static F32 load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
  }
  FEWBIT_INLINE_MEMBER static F32 load(const BFloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  FEWBIT_INLINE_MEMBER static F32 load(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
  }
  FEWBIT_INLINE_MEMBER void store(float* p) const { _mm512_storeu_ps(p, v); }
  // Past the caches, to an aligned vector; stream_end() before others may read it.
  FEWBIT_INLINE_MEMBER void stream(float* p) const { _mm512_stream_ps(p, v); }
  FEWBIT_INLINE_MEMBER void store(Half* p) const {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  FEWBIT_INLINE_MEMBER void store(BFloat16* p) const {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i r = _mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
  }
  // Codes 0..255 that the lanes hold as whole numbers.
  FEWBIT_INLINE_MEMBER void store(uint8_t* p) const {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  FEWBIT_INLINE_MEMBER void store(int8_t* p) const { store((uint8_t*)p); }  // -128..127
  FEWBIT_INLINE_MEMBER void store_low_byte(uint8_t* p) const {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_castps_si512(v)));
  }
};

FEWBIT_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
FEWBIT_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
FEWBIT_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
FEWBIT_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
// min and max give b when a lane of either is NaN, as the scalar a < b ? a : b does.
FEWBIT_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
FEWBIT_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
FEWBIT_INLINE F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
// The larger of |b| and a. Infinity is larger than any number, and a NaN larger than that: they
// compare as whole numbers. Only a NaN a with its sign bit set would be less than all.
FEWBIT_INLINE F32 max_abs(F32 a, F32 b) {
  return {_mm512_castsi512_ps(
      _mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(abs(b).v)))};
}
FEWBIT_INLINE F32 round(F32 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FEWBIT_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FEWBIT_INLINE F32 fnma(F32 a, F32 b, F32 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
FEWBIT_INLINE bool all_less(F32 a, F32 b) {  // false with a NaN
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ) == 0;
}
FEWBIT_INLINE float lane(F32 a, int i) {
  float t[16];
  a.store(t);
  return t[i];
}
FEWBIT_INLINE float reduce_min(F32 a) { return _mm512_reduce_min_ps(a.v); }  // of no NaN
FEWBIT_INLINE float reduce_max(F32 a) { return _mm512_reduce_max_ps(a.v); }

// Butterflies inside a vector, on strides 1, 2, .. 2^(stages - 1): lane i becomes a[i] + a[i +
// stride], lane i + stride becomes a[i] - a[i + stride]. Products by +1 and -1 are exact: one
// rounding each.
template <int stages>
FEWBIT_INLINE F32 butterflies(F32 a) {
  const auto step = [&](__m512 swapped, __mmask16 second) {
    const __m512 sign = _mm512_mask_blend_ps(second, _mm512_set1_ps(1), _mm512_set1_ps(-1));
    a.v = _mm512_fmadd_ps(a.v, sign, swapped);
  };
  if constexpr (stages > 0) step(_mm512_permute_ps(a.v, 0xB1), 0xAAAA);
  if constexpr (stages > 1) step(_mm512_permute_ps(a.v, 0x4E), 0xCCCC);
  if constexpr (stages > 2) step(_mm512_shuffle_f32x4(a.v, a.v, 0xB1), 0xF0F0);
  if constexpr (stages > 3) step(_mm512_shuffle_f32x4(a.v, a.v, 0x4E), 0xFF00);
  return a;
}

struct F64 {
  static constexpr int width = 8;
  __m512d v;

  FEWBIT_INLINE_MEMBER static F64 set(double a) { return {_mm512_set1_pd(a)}; }
  FEWBIT_INLINE_MEMBER static F64 zero() { return {_mm512_setzero_pd()}; }
  FEWBIT_INLINE_MEMBER static F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  FEWBIT_INLINE_MEMBER static F64 load(const float* p) {
    return {_mm512_maskz_cvtps_pd(0xFF, _mm256_loadu_ps(p))};  // unmasked, GCC 12 warns
  }
  FEWBIT_INLINE_MEMBER void store(double* p) const { _mm512_storeu_pd(p, v); }
};

// As many doubles as F32 has lanes, those of even lanes before those of odd ones.
struct Halves {
  F64 even, odd;

  FEWBIT_INLINE_MEMBER static Halves load(const double* p) {
    const __m512i at = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    const __m512i next = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
    const __m512d low = _mm512_loadu_pd(p), high = _mm512_loadu_pd(p + 8);
    return {{_mm512_permutex2var_pd(low, at, high)}, {_mm512_permutex2var_pd(low, next, high)}};
  }
  FEWBIT_INLINE_MEMBER void store(double* p) const {
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_storeu_pd(p, _mm512_permutex2var_pd(even.v, low, odd.v));
    _mm512_storeu_pd(p + 8, _mm512_permutex2var_pd(even.v, high, odd.v));
  }
};
// |a| 2^-896, exactly, of finite floats: their bits, moved to where a double has them, which is
// quicker than to convert.
FEWBIT_INLINE Halves shrunk_abs(F32 a) {
  const __m512i v = _mm512_castps_si512(a.v), no_sign = _mm512_set1_epi64(0x7FFFFFFF00000000);
  return {{_mm512_castsi512_pd(_mm512_srli_epi64(_mm512_slli_epi64(v, 33), 4))},
          {_mm512_castsi512_pd(_mm512_srli_epi64(_mm512_and_si512(v, no_sign), 3))}};
}
FEWBIT_INLINE F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
FEWBIT_INLINE Halves operator+(Halves a, Halves b) { return {a.even + b.even, a.odd + b.odd}; }
FEWBIT_INLINE F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
FEWBIT_INLINE F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
FEWBIT_INLINE F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
FEWBIT_INLINE F64 min(F64 a, F64 b) { return {_mm512_min_pd(a.v, b.v)}; }
FEWBIT_INLINE F64 max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
FEWBIT_INLINE F64 round(F64 a) {
  return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FEWBIT_INLINE F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }

// The quarters of four vectors, as a matrix.
FEWBIT_INLINE void transpose_quarters(__m512i a, __m512i b, __m512i c, __m512i d, U32* out,
                                      int step) {
  const __m512i even0 = _mm512_shuffle_i32x4(a, b, 0x88), even1 = _mm512_shuffle_i32x4(c, d, 0x88);
  const __m512i odd0 = _mm512_shuffle_i32x4(a, b, 0xDD), odd1 = _mm512_shuffle_i32x4(c, d, 0xDD);
  out[0].v = _mm512_shuffle_i32x4(even0, even1, 0x88);
  out[step].v = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
  out[2 * step].v = _mm512_shuffle_i32x4(even0, even1, 0xDD);
  out[3 * step].v = _mm512_shuffle_i32x4(odd0, odd1, 0xDD);
}
// Lane j of vector i becomes lane i of vector j.
FEWBIT_INLINE void transpose(U32 (&a)[16]) {
  __m512i t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(a[i].v, a[i + 1].v);
    t[i + 1] = _mm512_unpackhi_epi32(a[i].v, a[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      u[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
      u[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
    }
  for (int k = 0; k < 4; ++k) transpose_quarters(u[k], u[4 + k], u[8 + k], u[12 + k], a + k, 4);
}
// The same of pairs of lanes.
FEWBIT_INLINE void transpose(U32 (&a)[8]) {
  __m512i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_epi64(a[i].v, a[i + 1].v);
    t[i + 1] = _mm512_unpackhi_epi64(a[i].v, a[i + 1].v);
  }
  for (int k = 0; k < 2; ++k) transpose_quarters(t[k], t[2 + k], t[4 + k], t[6 + k], a + k, 2);
}

// Lane 2 i becomes a[2 i] | a[2 i + 1] << 4, lane 2 i + 1 the same of b; the top 4 bits of every
// lane are 0.
FEWBIT_INLINE U32 merge(U32 a, U32 b) {
  const __m512i low = _mm512_or_si512(a.v, _mm512_srli_epi64(a.v, 28));
  return {_mm512_mask_or_epi32(low, 0xAAAA, _mm512_slli_epi64(b.v, 32), _mm512_slli_epi64(b.v, 4))};
}
// The inverse, of lanes whose bytes are two fields of 4 bits.
FEWBIT_INLINE void split(U32 merged, U32& a, U32& b) {
  const __m512i v = merged.v, field = _mm512_set1_epi8(15);
  const auto both = [&](__m512i low, __m512i high) -> U32 {
    return {_mm512_mask_and_epi32(_mm512_and_si512(low, field), 0xAAAA, high, field)};
  };
  a = both(v, _mm512_slli_epi64(v, 28));
  b = both(_mm512_srli_epi64(v, 32), _mm512_srli_epi64(v, 4));
}

FEWBIT_INLINE U32 load_u32(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
FEWBIT_INLINE U32 operator>>(U32 a, int n) { return {_mm512_srli_epi32(a.v, unsigned(n))}; }
FEWBIT_INLINE U32 operator<<(U32 a, int n) { return {_mm512_slli_epi32(a.v, unsigned(n))}; }
FEWBIT_INLINE U32 operator&(U32 a, U32 b) { return {_mm512_and_si512(a.v, b.v)}; }
FEWBIT_INLINE U32 operator|(U32 a, U32 b) { return {_mm512_or_si512(a.v, b.v)}; }

struct I32 {
  __m512i v;
  FEWBIT_INLINE_MEMBER static I32 set(int32_t a) { return {_mm512_set1_epi32(a)}; }
  FEWBIT_INLINE_MEMBER static I32 zero() { return {_mm512_setzero_si512()}; }
  FEWBIT_INLINE_MEMBER static I32 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  FEWBIT_INLINE_MEMBER static I32 load(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))};
  }
  FEWBIT_INLINE_MEMBER void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
  FEWBIT_INLINE_MEMBER void store_low_byte(int8_t* p) const {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v));
  }
};
FEWBIT_INLINE I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
FEWBIT_INLINE I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
FEWBIT_INLINE I32 operator*(I32 a, I32 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
FEWBIT_INLINE I32 operator<<(I32 a, int n) { return {_mm512_slli_epi32(a.v, unsigned(n))}; }
FEWBIT_INLINE I32 operator>>(I32 a, int n) { return {_mm512_srai_epi32(a.v, unsigned(n))}; }
FEWBIT_INLINE F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
FEWBIT_INLINE I32 to_int(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest, ties to even

struct Dot {
  __m512i v;
  FEWBIT_INLINE_MEMBER static Dot zero() { return {_mm512_setzero_si512()}; }
};
#if FEWBIT_ISA_LEVEL >= 3
constexpr bool wide_dot = true;
FEWBIT_INLINE Dot dot(Dot sum, U32 q, U32 x) { return {_mm512_dpbusd_epi32(sum.v, q.v, x.v)}; }
FEWBIT_INLINE I32 widen(Dot sum) { return {sum.v}; }
#else
constexpr bool wide_dot = false;
FEWBIT_INLINE Dot dot(Dot sum, U32 q, U32 x) {
  return {_mm512_add_epi16(sum.v, _mm512_maddubs_epi16(q.v, x.v))};
}
FEWBIT_INLINE I32 widen(Dot sum) { return {_mm512_madd_epi16(sum.v, _mm512_set1_epi16(1))}; }
#endif
// The low `bits` bits of every lane, as float. Two- and four-bit codes are looked up: the
// instruction reads only the low 4 bits of its index, so no mask is needed.
template <int bits>
FEWBIT_INLINE F32 low_bits(U32 a) {
  if constexpr (bits <= 4) {
    constexpr float m = float((1 << bits) - 1);
    const __m512 table = _mm512_setr_ps(0, 1, bits == 1 ? 0 : 2, bits == 1 ? 1 : 3,
                                        bits == 4 ? 4 : 0, bits == 4 ? 5 : 1,
                                        bits == 1   ? 0
                                        : bits == 4 ? 6
                                                    : 2,
                                        bits == 1   ? 1
                                        : bits == 4 ? 7
                                                    : 3,
                                        bits == 4 ? 8 : 0, bits == 4 ? 9 : 1,
                                        bits == 1   ? 0
                                        : bits == 4 ? 10
                                                    : 2,
                                        bits == 1   ? 1
                                        : bits == 4 ? 11
                                                    : 3,
                                        bits == 4 ? 12 : 0, bits == 4 ? 13 : 1,
                                        bits == 1   ? 0
                                        : bits == 4 ? 14
                                                    : 2,
                                        m);
    return {_mm512_permutexvar_ps(a.v, table)};
  } else {
    return {_mm512_cvtepi32_ps(_mm512_and_si512(a.v, _mm512_set1_epi32((1 << bits) - 1)))};
  }
}

#elif FEWBIT_ISA_LEVEL == 1  // AVX2, FMA, F16C

struct U32 {
  __m256i v;
  FEWBIT_INLINE_MEMBER static U32 zero() { return {_mm256_setzero_si256()}; }
  FEWBIT_INLINE_MEMBER static U32 set(uint32_t a) { return {_mm256_set1_epi32(int(a))}; }
  FEWBIT_INLINE_MEMBER void store(uint32_t* p) const { _mm256_storeu_si256((__m256i*)p, v); }
};

struct F32 {
  static constexpr int width = 8;
  __m256 v;

  FEWBIT_INLINE_MEMBER static F32 set(float a) { return {_mm256_set1_ps(a)}; }
  FEWBIT_INLINE_MEMBER static F32 zero() { return {_mm256_setzero_ps()}; }
  FEWBIT_INLINE_MEMBER static F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  FEWBIT_INLINE_MEMBER static F32 load(const Half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))};
  }
  FEWBIT_INLINE_MEMBER static F32 load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  FEWBIT_INLINE_MEMBER static F32 load(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
  }
  FEWBIT_INLINE_MEMBER void store(float* p) const { _mm256_storeu_ps(p, v); }
  FEWBIT_INLINE_MEMBER void stream(float* p) const { _mm256_stream_ps(p, v); }
  FEWBIT_INLINE_MEMBER void store(Half* p) const {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  FEWBIT_INLINE_MEMBER void store(BFloat16* p) const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i r = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    const __m128i lo = _mm256_castsi256_si128(r), hi = _mm256_extracti128_si256(r, 1);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(lo, hi));
  }
  FEWBIT_INLINE_MEMBER void store(uint8_t* p) const {
    const __m256i i = _mm256_cvtps_epi32(v);
    const __m128i w = _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(w, w));
  }
  FEWBIT_INLINE_MEMBER void store(int8_t* p) const {
    const __m256i i = _mm256_cvtps_epi32(v);
    const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(w, w));
  }
  FEWBIT_INLINE_MEMBER void store_low_byte(uint8_t* p) const {
    const __m256i i = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(255));
    const __m128i w = _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(w, w));
  }
};

FEWBIT_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
FEWBIT_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
FEWBIT_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
FEWBIT_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
FEWBIT_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
FEWBIT_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
FEWBIT_INLINE F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
FEWBIT_INLINE F32 max_abs(F32 a, F32 b) {
  return {_mm256_castsi256_ps(
      _mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(abs(b).v)))};
}
FEWBIT_INLINE F32 round(F32 a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FEWBIT_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FEWBIT_INLINE F32 fnma(F32 a, F32 b, F32 c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
FEWBIT_INLINE bool all_less(F32 a, F32 b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)) == 0;
}
FEWBIT_INLINE float lane(F32 a, int i) {
  float t[8];
  a.store(t);
  return t[i];
}
FEWBIT_INLINE float reduce_min(F32 a) {  // of no NaN
  __m128 v = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  v = _mm_min_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_min_ss(v, _mm_movehdup_ps(v)));
}
FEWBIT_INLINE float reduce_max(F32 a) {
  return -reduce_min({_mm256_sub_ps(_mm256_setzero_ps(), a.v)});
}

template <int stages>
FEWBIT_INLINE F32 butterflies(F32 a) {
  const auto step = [&](__m256 swapped, __m256 sign) { a.v = _mm256_fmadd_ps(a.v, sign, swapped); };
  if constexpr (stages > 0)
    step(_mm256_permute_ps(a.v, 0xB1), _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1));
  if constexpr (stages > 1)
    step(_mm256_permute_ps(a.v, 0x4E), _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1));
  if constexpr (stages > 2)
    step(_mm256_permute2f128_ps(a.v, a.v, 1), _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1));
  return a;
}

struct F64 {
  static constexpr int width = 4;
  __m256d v;

  FEWBIT_INLINE_MEMBER static F64 set(double a) { return {_mm256_set1_pd(a)}; }
  FEWBIT_INLINE_MEMBER static F64 zero() { return {_mm256_setzero_pd()}; }
  FEWBIT_INLINE_MEMBER static F64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  FEWBIT_INLINE_MEMBER static F64 load(const float* p) {
    return {_mm256_cvtps_pd(_mm_loadu_ps(p))};
  }
  FEWBIT_INLINE_MEMBER void store(double* p) const { _mm256_storeu_pd(p, v); }
};

struct Halves {
  F64 even, odd;

  FEWBIT_INLINE_MEMBER static Halves load(const double* p) {
    const __m256d low = _mm256_loadu_pd(p), high = _mm256_loadu_pd(p + 4);
    return {{_mm256_permute4x64_pd(_mm256_unpacklo_pd(low, high), 0xD8)},
            {_mm256_permute4x64_pd(_mm256_unpackhi_pd(low, high), 0xD8)}};
  }
  FEWBIT_INLINE_MEMBER void store(double* p) const {
    const __m256d low = _mm256_unpacklo_pd(even.v, odd.v);
    const __m256d high = _mm256_unpackhi_pd(even.v, odd.v);
    _mm256_storeu_pd(p, _mm256_permute2f128_pd(low, high, 0x20));
    _mm256_storeu_pd(p + 4, _mm256_permute2f128_pd(low, high, 0x31));
  }
};
FEWBIT_INLINE Halves shrunk_abs(F32 a) {
  const __m256i v = _mm256_castps_si256(a.v), no_sign = _mm256_set1_epi64x(0x7FFFFFFF00000000);
  return {{_mm256_castsi256_pd(_mm256_srli_epi64(_mm256_slli_epi64(v, 33), 4))},
          {_mm256_castsi256_pd(_mm256_srli_epi64(_mm256_and_si256(v, no_sign), 3))}};
}
FEWBIT_INLINE F64 operator+(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
FEWBIT_INLINE Halves operator+(Halves a, Halves b) { return {a.even + b.even, a.odd + b.odd}; }
FEWBIT_INLINE F64 operator-(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
FEWBIT_INLINE F64 operator*(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
FEWBIT_INLINE F64 operator/(F64 a, F64 b) { return {_mm256_div_pd(a.v, b.v)}; }
FEWBIT_INLINE F64 min(F64 a, F64 b) { return {_mm256_min_pd(a.v, b.v)}; }
FEWBIT_INLINE F64 max(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }
FEWBIT_INLINE F64 round(F64 a) {
  return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FEWBIT_INLINE F64 fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }

FEWBIT_INLINE void transpose(U32 (&a)[8]) {
  __m256i t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(a[i].v, a[i + 1].v);
    t[i + 1] = _mm256_unpackhi_epi32(a[i].v, a[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      u[i + 2 * k] = _mm256_unpacklo_epi64(t[i + k], t[i + k + 2]);
      u[i + 2 * k + 1] = _mm256_unpackhi_epi64(t[i + k], t[i + k + 2]);
    }
  for (int k = 0; k < 4; ++k) {
    a[k].v = _mm256_permute2x128_si256(u[k], u[4 + k], 0x20);
    a[4 + k].v = _mm256_permute2x128_si256(u[k], u[4 + k], 0x31);
  }
}

FEWBIT_INLINE void transpose(U32 (&a)[4]) {
  __m256i t[4];
  for (int i = 0; i < 4; i += 2) {
    t[i] = _mm256_unpacklo_epi64(a[i].v, a[i + 1].v);
    t[i + 1] = _mm256_unpackhi_epi64(a[i].v, a[i + 1].v);
  }
  for (int k = 0; k < 2; ++k) {
    a[k].v = _mm256_permute2x128_si256(t[k], t[2 + k], 0x20);
    a[2 + k].v = _mm256_permute2x128_si256(t[k], t[2 + k], 0x31);
  }
}

FEWBIT_INLINE U32 merge(U32 a, U32 b) {
  const __m256i low = _mm256_or_si256(a.v, _mm256_srli_epi64(a.v, 28));
  const __m256i high = _mm256_or_si256(_mm256_slli_epi64(b.v, 32), _mm256_slli_epi64(b.v, 4));
  return {_mm256_blend_epi32(low, high, 0xAA)};
}
FEWBIT_INLINE void split(U32 merged, U32& a, U32& b) {
  const __m256i v = merged.v, field = _mm256_set1_epi8(15);
  a.v = _mm256_and_si256(_mm256_blend_epi32(v, _mm256_slli_epi64(v, 28), 0xAA), field);
  b.v = _mm256_blend_epi32(_mm256_srli_epi64(v, 32), _mm256_srli_epi64(v, 4), 0xAA);
  b.v = _mm256_and_si256(b.v, field);
}

FEWBIT_INLINE U32 load_u32(const uint32_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
FEWBIT_INLINE U32 operator>>(U32 a, int n) { return {_mm256_srli_epi32(a.v, n)}; }
FEWBIT_INLINE U32 operator<<(U32 a, int n) { return {_mm256_slli_epi32(a.v, n)}; }
FEWBIT_INLINE U32 operator&(U32 a, U32 b) { return {_mm256_and_si256(a.v, b.v)}; }
FEWBIT_INLINE U32 operator|(U32 a, U32 b) { return {_mm256_or_si256(a.v, b.v)}; }

struct I32 {
  __m256i v;
  FEWBIT_INLINE_MEMBER static I32 set(int32_t a) { return {_mm256_set1_epi32(a)}; }
  FEWBIT_INLINE_MEMBER static I32 zero() { return {_mm256_setzero_si256()}; }
  FEWBIT_INLINE_MEMBER static I32 load(const int32_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p)};
  }
  FEWBIT_INLINE_MEMBER static I32 load(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))};
  }
  FEWBIT_INLINE_MEMBER void store(int32_t* p) const { _mm256_storeu_si256((__m256i*)p, v); }
  FEWBIT_INLINE_MEMBER void store_low_byte(int8_t* p) const {
    F32{_mm256_castsi256_ps(v)}.store_low_byte((uint8_t*)p);
  }
};
FEWBIT_INLINE I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
FEWBIT_INLINE I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
FEWBIT_INLINE I32 operator*(I32 a, I32 b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
FEWBIT_INLINE I32 operator<<(I32 a, int n) { return {_mm256_slli_epi32(a.v, n)}; }
FEWBIT_INLINE I32 operator>>(I32 a, int n) { return {_mm256_srai_epi32(a.v, n)}; }
FEWBIT_INLINE F32 to_float(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
FEWBIT_INLINE I32 to_int(F32 a) { return {_mm256_cvtps_epi32(a.v)}; }

struct Dot {
  __m256i v;
  FEWBIT_INLINE_MEMBER static Dot zero() { return {_mm256_setzero_si256()}; }
};
constexpr bool wide_dot = false;
FEWBIT_INLINE Dot dot(Dot sum, U32 q, U32 x) {
  return {_mm256_add_epi16(sum.v, _mm256_maddubs_epi16(q.v, x.v))};
}
FEWBIT_INLINE I32 widen(Dot sum) { return {_mm256_madd_epi16(sum.v, _mm256_set1_epi16(1))}; }
template <int bits>
FEWBIT_INLINE F32 low_bits(U32 a) {
  return {_mm256_cvtepi32_ps(_mm256_and_si256(a.v, _mm256_set1_epi32((1 << bits) - 1)))};
}

#else  // portable

struct U32 {
  uint32_t v;
  FEWBIT_INLINE_MEMBER static U32 zero() { return {0}; }
  FEWBIT_INLINE_MEMBER static U32 set(uint32_t a) { return {a}; }
  FEWBIT_INLINE_MEMBER void store(uint32_t* p) const { __builtin_memcpy(p, &v, 4); }
};

struct F32 {
  static constexpr int width = 1;
  float v;

  FEWBIT_INLINE_MEMBER static F32 set(float a) { return {a}; }
  FEWBIT_INLINE_MEMBER static F32 zero() { return {0.0f}; }
  template <class T>
  FEWBIT_INLINE_MEMBER static F32 load(const T* p) {
    return {to_float(*p)};
  }
  FEWBIT_INLINE_MEMBER static F32 load(const uint8_t* p) { return {float(*p)}; }
  template <class T>
  FEWBIT_INLINE_MEMBER void store(T* p) const {
    from_float(v, p);
  }
  FEWBIT_INLINE_MEMBER void stream(float* p) const { *p = v; }
  FEWBIT_INLINE_MEMBER void store(uint8_t* p) const { *p = uint8_t(v); }
  FEWBIT_INLINE_MEMBER void store(int8_t* p) const { *p = int8_t(v); }
  FEWBIT_INLINE_MEMBER void store_low_byte(uint8_t* p) const { *p = uint8_t(bits_of(v)); }
};

FEWBIT_INLINE F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
FEWBIT_INLINE F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
FEWBIT_INLINE F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
FEWBIT_INLINE F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
FEWBIT_INLINE F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
FEWBIT_INLINE F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
FEWBIT_INLINE F32 abs(F32 a) { return {abs_of(a.v)}; }
FEWBIT_INLINE F32 max_abs(F32 a, F32 b) { return {max_abs(a.v, b.v)}; }
FEWBIT_INLINE F32 round(F32 a) { return {round_even(a.v)}; }
// Fused, as on the other ISAs: results agree bit for bit (slow where the CPU has no FMA).
FEWBIT_INLINE F32 fma(F32 a, F32 b, F32 c) { return {__builtin_fmaf(a.v, b.v, c.v)}; }
FEWBIT_INLINE F32 fnma(F32 a, F32 b, F32 c) { return {__builtin_fmaf(-a.v, b.v, c.v)}; }
FEWBIT_INLINE bool all_less(F32 a, F32 b) { return a.v < b.v; }
FEWBIT_INLINE float lane(F32 a, int) { return a.v; }
FEWBIT_INLINE float reduce_min(F32 a) { return a.v; }
FEWBIT_INLINE float reduce_max(F32 a) { return a.v; }
template <int>
FEWBIT_INLINE F32 butterflies(F32 a) {
  return a;
}

struct F64 {
  static constexpr int width = 1;
  double v;

  FEWBIT_INLINE_MEMBER static F64 set(double a) { return {a}; }
  FEWBIT_INLINE_MEMBER static F64 zero() { return {0.0}; }
  FEWBIT_INLINE_MEMBER static F64 load(const double* p) { return {*p}; }
  FEWBIT_INLINE_MEMBER static F64 load(const float* p) { return {double(*p)}; }
  FEWBIT_INLINE_MEMBER void store(double* p) const { *p = v; }
};

struct Halves {
  F64 only;
  FEWBIT_INLINE_MEMBER static Halves load(const double* p) { return {{*p}}; }
  FEWBIT_INLINE_MEMBER void store(double* p) const { *p = only.v; }
};
FEWBIT_INLINE Halves shrunk_abs(F32 a) { return {{double(abs_of(a.v)) * 0x1p-896}}; }
FEWBIT_INLINE F64 operator+(F64 a, F64 b) { return {a.v + b.v}; }
FEWBIT_INLINE Halves operator+(Halves a, Halves b) { return {a.only + b.only}; }
FEWBIT_INLINE F64 operator-(F64 a, F64 b) { return {a.v - b.v}; }
FEWBIT_INLINE F64 operator*(F64 a, F64 b) { return {a.v * b.v}; }
FEWBIT_INLINE F64 operator/(F64 a, F64 b) { return {a.v / b.v}; }
FEWBIT_INLINE F64 min(F64 a, F64 b) { return {a.v < b.v ? a.v : b.v}; }
FEWBIT_INLINE F64 max(F64 a, F64 b) { return {a.v > b.v ? a.v : b.v}; }
FEWBIT_INLINE F64 round(F64 a) { return {__builtin_nearbyint(a.v)}; }
FEWBIT_INLINE F64 fma(F64 a, F64 b, F64 c) { return {__builtin_fma(a.v, b.v, c.v)}; }

FEWBIT_INLINE void transpose(U32 (&)[1]) {}

FEWBIT_INLINE U32 load_u32(const uint32_t* p) {
  U32 a;
  __builtin_memcpy(&a, p, 4);
  return a;
}
FEWBIT_INLINE U32 operator>>(U32 a, int n) { return {a.v >> n}; }
FEWBIT_INLINE U32 operator<<(U32 a, int n) { return {a.v << n}; }
FEWBIT_INLINE U32 operator&(U32 a, U32 b) { return {a.v & b.v}; }
FEWBIT_INLINE U32 operator|(U32 a, U32 b) { return {a.v | b.v}; }

struct I32 {
  int32_t v;
  FEWBIT_INLINE_MEMBER static I32 set(int32_t a) { return {a}; }
  FEWBIT_INLINE_MEMBER static I32 zero() { return {0}; }
  FEWBIT_INLINE_MEMBER static I32 load(const int32_t* p) { return {*p}; }
  FEWBIT_INLINE_MEMBER static I32 load(const uint8_t* p) { return {int32_t(*p)}; }
  FEWBIT_INLINE_MEMBER void store(int32_t* p) const { *p = v; }
  FEWBIT_INLINE_MEMBER void store_low_byte(int8_t* p) const { *p = int8_t(v); }
};
FEWBIT_INLINE I32 operator+(I32 a, I32 b) { return {a.v + b.v}; }
FEWBIT_INLINE I32 operator-(I32 a, I32 b) { return {a.v - b.v}; }
FEWBIT_INLINE I32 operator*(I32 a, I32 b) { return {a.v * b.v}; }
FEWBIT_INLINE I32 operator<<(I32 a, int n) { return {int32_t(uint32_t(a.v) << n)}; }
FEWBIT_INLINE I32 operator>>(I32 a, int n) { return {a.v >> n}; }
FEWBIT_INLINE F32 to_float(I32 a) { return {float(a.v)}; }
FEWBIT_INLINE I32 to_int(F32 a) { return {int32_t(round_even(a.v))}; }

struct Dot {
  int32_t v;
  FEWBIT_INLINE_MEMBER static Dot zero() { return {0}; }
};
constexpr bool wide_dot = true;
FEWBIT_INLINE Dot dot(Dot sum, U32 q, U32 x) {
  for (int i = 0; i < 4; ++i) sum.v += int32_t(q.v >> 8 * i & 255u) * int8_t(x.v >> 8 * i);
  return sum;
}
FEWBIT_INLINE I32 widen(Dot sum) { return {sum.v}; }
template <int bits>
FEWBIT_INLINE F32 low_bits(U32 a) {
  return {float(a.v & ((1u << bits) - 1u))};
}

#endif

// ---- memory ------------------------------------------------------------------------------------

constexpr int64_t line = 64;  // bytes of a cache line

// Asks for what lies 8 KiB behind p. A kernel that works on a stream as it reads it otherwise waits
// for memory: what the hardware fetches by itself ends with the page.
FEWBIT_INLINE void ask_ahead(const void* p) { __builtin_prefetch((const char*)p + 8192); }

// Asks for the line of p, not into the first cache but the second: it is wanted much later.
FEWBIT_INLINE void ask_later(const void* p) { __builtin_prefetch(p, 0, 2); }

// Asks for `bytes` from p on, which are met in another order than they lie.
FEWBIT_INLINE void ask(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += line) __builtin_prefetch((const char*)p + i);
}

// Copies `lines` cache lines to aligned memory without reading it first and without displacing what
// the caches hold: for results larger than they are. stream_end() before others may read them.
FEWBIT_INLINE void stream(const void* from, void* to, int64_t lines) {
#if FEWBIT_ISA_LEVEL >= 2
  const __m512i* in = (const __m512i*)from;
  __m512i* out = (__m512i*)to;
  for (int64_t i = 0; i < lines; ++i) _mm512_stream_si512(out + i, _mm512_loadu_si512(in + i));
#elif FEWBIT_ISA_LEVEL >= 1
  const __m256i* in = (const __m256i*)from;
  __m256i* out = (__m256i*)to;
  for (int64_t i = 0; i < 2 * lines; ++i) _mm256_stream_si256(out + i, _mm256_loadu_si256(in + i));
#else
  __builtin_memcpy(to, from, size_t(lines * line));
#endif
}
FEWBIT_INLINE void put_lines(const void* from, void* to, int64_t lines, bool past) {
  if (past)
    stream(from, to, lines);
  else
    __builtin_memcpy(to, from, size_t(lines * line));
}
FEWBIT_INLINE void stream_end() {
#if FEWBIT_ISA_LEVEL >= 1
  _mm_sfence();
#endif
}
// Has make(k, count, to) write elements [k, k + count) of n, `past` the caches through a buffer;
// then out must be aligned and n a whole number of lines.
template <class T, class F>
FEWBIT_INLINE void put_pieces(int64_t n, bool past, T* out, const F& make) {
  if (!past) return make(0, n, out);
  constexpr int64_t piece = 256;
  alignas(line) T staged[piece];
  for (int64_t k = 0; k < n; k += piece) {
    const int64_t count = n - k < piece ? n - k : piece;
    make(k, count, staged);
    stream(staged, out + k, count * int64_t(sizeof(T)) / line);
  }
}

// ---- built from the above ----------------------------------------------------------------------

// Calls add(i, c) for every whole vector of n columns, in turn with each of the chains c of
// dependent instructions, whose latency they hide from each other; the columns that this makes.
constexpr int chains = 2;  // their users name both
template <class F>
FEWBIT_INLINE int64_t in_chains(int64_t n, const F& add) {
  int64_t i = 0;
  for (; i + chains * F32::width <= n; i += chains * F32::width)
    for (int c = 0; c < chains; ++c) add(i + c * F32::width, c);
  for (; i + F32::width <= n; i += F32::width) add(i, 0);
  return i;
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls run(Count, i) for i in first .. last - 1, `most` at a time while there are as many, then
// half of it: a count known to the compiler keeps their sums in registers.
template <int most, class F>
FEWBIT_INLINE void in_counts(int64_t first, int64_t last, const F& run) {
  for (; first + most <= last; first += most) run(Count<most>{}, first);
  if constexpr (most > 1) in_counts<most / 2>(first, last, run);
}

// Dot is a running sum of products of bytes: dot(sum, q, x) adds the four products of unsigned q
// and signed x of every 32-bit lane, widen() gives the lanes' sums. Where the sum is kept in 16
// bits (wide_dot is false) it is exact for `dot_steps` additions while q |x| <= 255 * 8, that is
// |sum of a 16-bit half| <= 8 * 2 * 255 * 8 < 2^15.
constexpr int dot_steps = 8;

// The vector of a float type.
template <class Real>
struct VectorOf {
  using type = F32;
};
template <>
struct VectorOf<double> {
  using type = F64;
};
template <class Real>
using Vector = typename VectorOf<Real>::type;

// round(v / s) for finite s > 0; `inverse` is inverse_of(s). The product differs from the quotient
// by less than 2^-22 of itself, so both round alike unless that close to the middle of two numbers.
FEWBIT_INLINE float inverse_of(float s) {
  return s <= 0x1p125f ? 1.0f / s : __builtin_nanf("");  // a subnormal inverse is not exact enough
}
FEWBIT_INLINE F32 round_quotient(F32 v, F32 s, F32 inverse) {
  if constexpr (F32::width == 1) return round(v / s);
  const F32 product = v * inverse, whole = round(product);
  const F32 middle = fma(abs(product), F32::set(0x1p-22f), abs(product - whole));
  return __builtin_expect(all_less(middle, F32::set(0.5f)), 1) ? whole : round(v / s);
}

// Low bytes of the codes clamp(round(x / s) + z, low, high) of n numbers, whole vectors, that
// load(i) gives; whether they are all right. Added to 1.5 2^23 + z, a float has no room but for a
// whole number, the code, in its low bits: one multiply-add rounds x inverse + z. `far` is how far
// the product was from what it became. It is within 2^-23 `reach` of the quotient that a code can
// depend on, so where no number is that close to the middle of two codes, nor a NaN, all are those
// of x / s. Without `clamped`, the caller knows that codes of finite numbers lie in low .. high.
template <bool clamped = true, class Load>
FEWBIT_INLINE bool codes_by_inverse(int64_t n, const Load& load, F32 inverse, F32 z, F32 low,
                                    F32 high, float reach, uint8_t* q) {
  const F32 zero = F32::set(0x1.8p23f), shift = zero + z, least = zero + low, top = zero + high;
  F32 far = F32::zero();
  for (int64_t i = 0; i < n; i += F32::width) {
    const F32 v = load(i), code = fma(v, inverse, shift);
    far = max_abs(far, fma(v, inverse, shift - code));  // a NaN stays
    (clamped ? min(max(code, least), top) : code).store_low_byte(q + i);
  }
  return all_less(far, F32::set(0.5f - 0x1p-22f * reach));
}

// The same in pieces, all of them right: one that holds a middle of two codes is divided by s.
template <int64_t piece, bool clamped = true, class Load, class Q>
FEWBIT_INLINE void codes_of(int64_t n, const Load& load, F32 s, F32 inverse, F32 z, F32 low,
                            F32 high, float reach, Q* q) {
  for (int64_t i = 0; i < n; i += piece) {
    const int64_t count = n - i < piece ? n - i : piece;
    const auto part = [&](int64_t k) { return load(i + k); };
    if (F32::width == 1 || !codes_by_inverse<clamped>(count, part, inverse, z, low, high, reach,
                                                      reinterpret_cast<uint8_t*>(q + i)))
      for (int64_t k = 0; k < count; k += F32::width)
        min(max(round(part(k) / s) + z, low), high).store(q + i + k);
  }
}

// element<T*> is T: the type behind the tag that with_type passes.
template <class T>
struct Pointee;
template <class T>
struct Pointee<T*> {
  using type = T;
};
template <class P>
using element = typename Pointee<P>::type;

// Calls f with a null pointer of the element type that `t` names.
template <class F>
FEWBIT_INLINE void with_type(DType t, const F& f) {
  switch (t) {
    case DType::f32: f((float*)nullptr); break;
    case DType::f16: f((Half*)nullptr); break;
    case DType::bf16: f((BFloat16*)nullptr); break;
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
