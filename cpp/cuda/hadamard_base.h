// One base of signs, y = B^T z for z [m, n], on tensor cores: m multiply-adds an element are too
// many for anything else.
//
// A float is the sum of two halves but for one unit in its last place: z is scaled by a power of
// two to what halves hold best, z s = high + rest. Products with signs are exact, sums are float32
// (which tensor cores cut off, not round), and both parts go into the same sum.
#pragma once
#include "hadamard_rows.h"
#include "mma.h"

namespace fewbit::cuda {

// Of 16 outputs and of 8 columns: what a warp has at once, so that z is read for all of the outputs
// and signs are taken from masks for all of the columns.
constexpr int base_tiles = 6, base_columns = 2;

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

// From z [m, 2^k], two_halves at shared_place of each value, k at least 5. put(e, f, sums) takes
// the two neighbours at e ^ f, e being the same for all of a column; in place, all warps that read
// a column have done so before.
template <int level, bool in_place, class Put>
FEWBIT_DEVICE void base_on_tensor_cores(int m, int k, const uint32_t* masks, const uint32_t* z,
                                        const Put& put) {
  const int lane = int(threadIdx.x) % warp_size, g = lane / 4, t = lane % 4;
  const int warp = int(threadIdx.x) / warp_size, warps = int(blockDim.x) / warp_size;
  const int tiles = tiles_of(m), outputs = 16 * tiles;
  const int chunks = (tiles + base_tiles - 1) / base_tiles, slots = warps / chunks;
  const int slot = warp / chunks, first_tile = (warp - slot * chunks) * base_tiles;
  int by[4];  // from row 2 t of a tile of inputs to rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9
#pragma unroll
  for (int j = 0; j < 4; ++j) by[j] = shared_place((j % 2 + 8 * (j / 2)) << k);
#pragma unroll 1
  for (int first = 0; first << 4 < 1 << k; first += slots) {
    const int column = (first + slot) * 8 * base_columns;
    const bool works = slot < slots && column < 1 << k;
    float sum[base_tiles][base_columns][4] = {};
    if (works) {
      const int at = shared_place(2 * t << k | column | g);
      const uint32_t* mask = masks + first_tile * 16 + g;
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        const int here = at ^ shared_place(tile * 16 << k), left = m - 2 * t - tile * 16;
        uint32_t high[base_columns][2], rest[base_columns][2];
#pragma unroll
        for (int c = 0; c < base_columns; ++c) {
          uint32_t word[4];
#pragma unroll
          for (int j = 0; j < 4; ++j)
            word[j] = left > j % 2 + 8 * (j / 2) ? z[here ^ by[j] ^ shared_place(8 * c)] : 0u;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            high[c][j] = __byte_perm(word[2 * j], word[2 * j + 1], 0x5410);
            rest[c][j] = __byte_perm(word[2 * j], word[2 * j + 1], 0x7632);
          }
        }
#pragma unroll
        for (int i = 0; i < base_tiles; ++i) {
          if (first_tile + i >= tiles) break;
          uint32_t a[4];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t signs = mask[i * 16 + h * 8] << t;
            a[h] = (signs & 0x80008000u) | 0x3C003C00u;
            a[h + 2] = (signs << 4 & 0x80008000u) | 0x3C003C00u;
          }
#pragma unroll
          for (int c = 0; c < base_columns; ++c) {
            multiply<level, Half>(sum[i][c], a, high[c]);
            multiply<level, Half>(sum[i][c], a, rest[c]);
          }
        }
        mask += outputs;
      }
    }
    if constexpr (in_place) __syncthreads();
    if (!works) continue;
    const int e = g << k | column | 2 * t;
#pragma unroll
    for (int i = 0; i < base_tiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int o = (first_tile + i) * 16 + h * 8;
        if (o + g < m) {
#pragma unroll
          for (int c = 0; c < base_columns; ++c)
            put(e, o << k | 8 * c, {sum[i][c][2 * h], sum[i][c][2 * h + 1]});
        }
      }
  }
}

}  // namespace fewbit::cuda
