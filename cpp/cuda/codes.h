// Codes of weights (fewbit/grid.h) and activations (fewbit/quantize_per_token.h), the same bits as
// there without a division for each.
#pragma once
#include "device.h"
#include "fewbit/grid.h"
#include "fewbit/quantize_per_token.h"

namespace fewbit::cuda {

// A float of this size has no room but for a whole number: 1.5 2^23 + c holds c in its low bits.
constexpr float whole_base = 0x1.8p23f;

// clamp(round(v / s) + z, low, high)
struct Coder {
  float s, z, low, high;
  float inverse;  // 1 / s, rounded
  bool clamps;    // whether codes of what s was made for can be past low or high

  FEWBIT_DEVICE Coder(float s, float z, float low, float high, bool clamps = true)
      // A subnormal inverse is not exact enough, nor do codes far from 0 fit; a NaN is never sure.
      : s(s),
        z(z),
        low(low),
        high(high),
        inverse(fabsf(s) <= 0x1p125f && fabsf(z) <= 255.0f ? 1.0f / s : float_of(0x7FC00000u)),
        clamps(clamps) {}
  FEWBIT_DEVICE explicit Coder(const Step& g) : Coder(g.s, g.z, 0.0f, g.qmax) {}
  // fitted: to the row at hand, whose largest |v| is then s top but for a rounding of s.
  FEWBIT_DEVICE Coder(const TokenStep& g, const TokenGrid& grid, bool fitted)
      : Coder(g.s, g.z, grid.least(), grid.top(), !fitted || !grid.symmetric || grid.clip > 0.0f) {}

  // whole_base + the codes of V numbers.
  //
  // One multiply-add rounds v inverse + z. inverse is off 1 / s by 2^-24 of itself at most, and
  // v / s is rounded by as much: the two differ by less than 2^-23 |v / s|. Up to 512, where clamp
  // gives low or high whatever they are, that is 2^-14; so both round alike unless v inverse comes
  // within 2^-13 of a middle of two whole numbers. There, and for what is not finite, all of the
  // thread's numbers are divided: 1 in 4096 for each of them.
  template <int V>
  FEWBIT_DEVICE void shifted_codes(const float (&v)[V], float (&code)[V]) const {
    const float base = whole_base + z;
    bool sure = true;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float t = fmaf(v[j], inverse, base);
      sure &= fabsf(fmaf(v[j], inverse, base - t)) < 0.5f - 0x1p-13f;
      code[j] = t;
    }
    if (clamps) {
#pragma unroll
      for (int j = 0; j < V; ++j)
        code[j] = fminf(fmaxf(code[j], whole_base + low), whole_base + high);
    }
    if (sure) return;
#pragma unroll
    for (int j = 0; j < V; ++j) code[j] = whole_base + code_of(v[j], s, z, low, high);
  }

  // q of one number.
  FEWBIT_DEVICE float code(float v) const {
    float one[1] = {v}, shifted[1];
    shifted_codes(one, shifted);
    return shifted[0] - whole_base;
  }

  // (q - z) s of shifted codes.
  template <class T, int V>
  FEWBIT_DEVICE Vector<T, V> values(const float (&code)[V]) const {
    Vector<T, V> y;
#pragma unroll
    for (int j = 0; j < V; ++j) from_float((code[j] - (whole_base + z)) * s, &y.v[j]);
    return y;
  }
};

// Low bytes of shifted codes.
template <class Byte, int V>
FEWBIT_DEVICE Vector<Byte, V> bytes_of(const float (&code)[V]) {
  if constexpr (V % 4 == 0) {
    Vector<uint32_t, V / 4> words;
#pragma unroll
    for (int j = 0; j < V / 4; ++j) {
      const uint32_t low = __byte_perm(bits_of(code[4 * j]), bits_of(code[4 * j + 1]), 0x0040);
      const uint32_t high = __byte_perm(bits_of(code[4 * j + 2]), bits_of(code[4 * j + 3]), 0x0040);
      words.v[j] = __byte_perm(low, high, 0x5410);
    }
    return __builtin_bit_cast(Vector<Byte, V>, words);
  } else {
    Vector<Byte, V> bytes;
#pragma unroll
    for (int j = 0; j < V; ++j) bytes.v[j] = Byte(uint8_t(bits_of(code[j])));
    return bytes;
  }
}

}  // namespace fewbit::cuda
