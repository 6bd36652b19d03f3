// One base of signs, y = B^T z for z [m, n], on tensor cores: m multiply-adds an element are too
// many for anything else.
//
// A float is the sum of two halves but for one unit in its last place: z is scaled by a power of
// two to what halves hold best, z s = high + rest. Products with signs are exact, sums are float32
// (which tensor cores cut off, not round), and both parts go into the same sum.
#pragma once
#include "mma.h"

namespace fewbit::cuda {

constexpr int base_tiles = 4;  // of 16 outputs that a warp has at once: z is read for all of them

FEWBIT_ALWAYS_INLINE int tiles_of(int m) { return (m + 15) / 16; }
// Words of the masks: 16 signs each, of every output for every tile of inputs.
FEWBIT_ALWAYS_INLINE int mask_words(int m) { return 16 * tiles_of(m) * tiles_of(m); }

// Where the sign of the j-th of a tile's inputs is in a word: shifted to the left by p, it has
// those of inputs 2 p and 2 p + 1 in the sign bits of two halves.
FEWBIT_ALWAYS_INLINE int mask_bit(int j) { return (j % 2 == 0 ? 15 : 31) - j / 2; }

// masks[tile of inputs][output]
FEWBIT_DEVICE void make_masks(const int8_t* signs, int m, uint32_t* masks) {
  const int outputs = 16 * tiles_of(m);
#pragma unroll 1
  for (int at = int(threadIdx.x); at < mask_words(m); at += int(blockDim.x)) {
    const int o = at % outputs, first = at / outputs * 16;
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 16; ++j)
      if (o < m && first + j < m && signs[(first + j) * m + o] < 0) word |= 1u << mask_bit(j);
    masks[at] = word;
  }
}

// A power of two that brings numbers up to `bound` below 2^15, and its inverse; neither is
// subnormal.
struct HalfScale {
  float to, back;
  bool serves;  // not where the bound is not finite
};
FEWBIT_DEVICE HalfScale half_scale(float bound) {
  const int exponent = int(bits_of(bound) >> 23), to = 268 - exponent < 253 ? 268 - exponent : 253;
  return {float_of(uint32_t(to) << 23), float_of(uint32_t(254 - to) << 23), exponent < 255};
}

// High part and rest.
FEWBIT_DEVICE uint32_t two_halves(float v) {
  Half high, rest;
  from_float(v, &high);
  from_float(v - to_float(high), &rest);
  return high.bits | uint32_t(rest.bits) << 16;
}

// From z, two_halves at shared_place of each value, n a power of two from 32 on (16 rows of z are
// then whole periods of shared_place). put(e, sums) takes two neighbours; in place, all warps that
// read a column have done so before.
template <int level, bool in_place, class Put>
FEWBIT_DEVICE void base_on_tensor_cores(int m, int n, const uint32_t* masks, const uint32_t* z,
                                        const Put& put) {
  const int lane = int(threadIdx.x) % warp_size, g = lane / 4, t = lane % 4;
  const int warp = int(threadIdx.x) / warp_size, warps = int(blockDim.x) / warp_size;
  const int tiles = tiles_of(m), outputs = 16 * tiles;
  const int chunks = (tiles + base_tiles - 1) / base_tiles, slots = warps / chunks;
  const int chunk = warp % chunks;
#pragma unroll 1
  for (int first = 0; first < n / 8; first += slots) {
    const int column = first + warp / chunks;  // tile of eight columns
    const bool works = warp < slots * chunks && column < n / 8;
    float sum[base_tiles][4] = {};
    if (works) {
      const uint32_t* from[4];
      int row[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        row[j] = 2 * t + j % 2 + 8 * (j / 2);
        from[j] = z + shared_place(row[j] * n + column * 8 + g);
      }
#pragma unroll 1
      for (int k = 0; k < tiles; ++k) {
        uint32_t word[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          word[j] = k * 16 + row[j] < m ? *from[j] : 0u;
          from[j] += 16 * n;
        }
        const uint32_t high[2] = {__byte_perm(word[0], word[1], 0x5410),
                                  __byte_perm(word[2], word[3], 0x5410)};
        const uint32_t rest[2] = {__byte_perm(word[0], word[1], 0x7632),
                                  __byte_perm(word[2], word[3], 0x7632)};
        const uint32_t* const mask = masks + k * outputs + chunk * base_tiles * 16 + g;
#pragma unroll
        for (int i = 0; i < base_tiles; ++i) {
          if (chunk * base_tiles + i >= tiles) break;
          uint32_t a[4];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t signs = mask[i * 16 + h * 8] << t;
            a[h] = (signs & 0x80008000u) | 0x3C003C00u;
            a[h + 2] = (signs << 4 & 0x80008000u) | 0x3C003C00u;
          }
          multiply<level, Half>(sum[i], a, high);
          multiply<level, Half>(sum[i], a, rest);
        }
      }
    }
    if constexpr (in_place) __syncthreads();
    if (!works) continue;
#pragma unroll
    for (int i = 0; i < base_tiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int o = (chunk * base_tiles + i) * 16 + h * 8 + g;
        if (o < m) put(o * n + column * 8 + 2 * t, {sum[i][2 * h], sum[i][2 * h + 1]});
      }
  }
}

}  // namespace fewbit::cuda
