// Activations to int8 or int4, one scale per token (row):
//
//   symmetric:   s = max |x| / top            z = 0                             q in -top..top
//   clipped:     s = max |x| c / (top + 1/2)  z = 0                             q in -top-1..top
//   asymmetric:  s = (hi - lo) / 255          z = clamp(round(-128 - lo / s))   q in -128..127
//   static:      s and z are given
//   top = 2^(bits - 1) - 1: 127, or 7 (symmetric and clipped)
//   q = clamp(round(x / s) + z)             x' = (q - z) s
//
// lo = min(0, min x) and hi = max(0, max x). Rounds half to even and divides by s: CPU results
// equal python/fewbit/reference.py bit for bit. A row of zeros has s = 1. A row with a NaN or an
// infinity has s = NaN and the least code, so that what is computed from it is NaN. Columns marked
// in `skip` (LLM.int8()'s outliers, arXiv 2208.07339) count as 0 in range and codes.
//
// Codes of 4 bits are int8 numbers, or eight of them in a word in the order of the packed layout's
// units (layout.h), in two's complement: column i of the eight is at bits 8 (i % 4) + 4 (i / 4).
#pragma once
#include "fewbit/kernel.h"
#include "fewbit/numeric.h"

namespace fewbit {

struct TokenGrid {
  bool symmetric;
  int bits = 8;       // or 4
  float clip = 0.0f;  // c of the clipped grid; 0: the symmetric or asymmetric one

  FEWBIT_ALWAYS_INLINE float top() const { return float((1 << (bits - 1)) - 1); }
  FEWBIT_ALWAYS_INLINE float least() const {
    return symmetric && !(clip > 0.0f) ? -top() : -top() - 1.0f;
  }
};

struct QuantizePerToken {
  const void* x;              // [m, columns] of dtype, row-major
  const uint8_t* skip;        // [columns]; or null
  const float* fixed_scale;   // one scale for all rows; or null: dynamic
  const int32_t* fixed_zero;  // one zero point; or null
  int8_t* q;                  // [m, columns]
  float* scale;               // [m]
  int32_t* zero_point;        // [m]
  DType dtype;
  TokenGrid grid;
  int64_t m;
  int64_t columns;
  uint32_t* words = nullptr;  // [m, columns / 8]: codes of 4 bits go there, not to q
  bool past = false;          // q goes past the caches, being larger

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return m; }
};

FEWBIT_KERNEL(QuantizePerToken)

struct TokenStep {
  float s;
  float z;  // a whole number
};

// Word of eight 4-bit codes from two words of int8 codes, columns 0..3 and 4..7.
FEWBIT_ALWAYS_INLINE uint32_t word_of_fours(uint32_t low, uint32_t high) {
  return (low & 0x0F0F0F0Fu) | (high & 0x0F0F0F0Fu) << 4;
}
// Column i of such a word.
FEWBIT_ALWAYS_INLINE int8_t four_of_word(uint32_t word, int i) {
  const int code = int(word >> (8 * (i % 4) + 4 * (i / 4)) & 0xFu);
  return int8_t(code < 8 ? code : code - 16);
}

FEWBIT_ALWAYS_INLINE TokenStep token_step(float lo, float hi, bool finite, TokenGrid grid) {
  const float top = -lo > hi ? -lo : hi;
  if (!finite) return {float_of(0x7FC00000u), 0.0f};
  if (!(top > 0.0f)) return {1.0f, grid.symmetric ? 0.0f : -128.0f};
  float s;
  if (grid.clip > 0.0f) {
    s = top * grid.clip / (grid.top() + 0.5f);
  } else if (grid.symmetric) {
    s = top / grid.top();
  } else {
    const float range = hi - lo;
    s = range <= 3.4028235e38f ? range / 255.0f : hi / 255.0f - lo / 255.0f;
  }
  s = s < 0x1p-126f ? 0x1p-126f : s;  // the least normal number: division by s stays finite
  if (grid.symmetric) return {s, 0.0f};
  const float z = round_even(-128.0f - lo / s);
  return {s, z < -128.0f ? -128.0f : z < 127.0f ? z : 127.0f};
}

FEWBIT_ALWAYS_INLINE int8_t token_code(float v, TokenStep step, TokenGrid grid) {
  return int8_t(code_of(v, step.s, step.z, grid.least(), grid.top()));
}

}  // namespace fewbit
