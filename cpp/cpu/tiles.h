// Byte products of whole tiles, 16 rows of 64 bytes: AMX, and the same in plain C++ so that the
// kernels written on it run on any machine. Included by kernel files only, as simd.h is.
#pragma once
#include "fewbit/layout.h"
#include "simd.h"

#if FEWBIT_ISA_LEVEL == 4 || FEWBIT_ISA_LEVEL == 0
#define FEWBIT_HAS_TILES 1
#else
#define FEWBIT_HAS_TILES 0
#endif

#if FEWBIT_HAS_TILES
namespace fewbit::cpu::FEWBIT_ISA {

// Per lane: a byte four times over, and the bytes' differences.
#if FEWBIT_ISA_LEVEL == 4
FEWBIT_INLINE U32 spread_bytes(const uint8_t* p) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  return {_mm512_mullo_epi32(bytes, _mm512_set1_epi32(0x01010101))};
}
FEWBIT_INLINE U32 subtract_bytes(U32 a, U32 b) { return {_mm512_sub_epi8(a.v, b.v)}; }
#else
FEWBIT_INLINE U32 spread_bytes(const uint8_t* p) { return {*p * 0x01010101u}; }
FEWBIT_INLINE U32 subtract_bytes(U32 a, U32 b) {
  uint32_t r = 0;
  for (int i = 0; i < 32; i += 8) r |= (((a.v >> i) - (b.v >> i)) & 255u) << i;
  return {r};
}
#endif

// Eight tile registers. A left tile holds 16 rows of 64 bytes, a right tile 64 columns of 16
// outputs as 16 rows of four columns each (a quad of a panel, codes.h), a sum 16 rows of 16 int32.
//
//   sum[r][n] += sum_{j < 16, b < 4} left[r][4 j + b] right[j][4 n + b]
//
// The first `rows` rows of left tiles and sums are computed. Left bytes are signed, right bytes
// signed or not. In memory a tile is contiguous.
#if FEWBIT_ISA_LEVEL == 4

// The assembler is written out: GCC 12's intrinsics take no template parameters and do not say
// that they read and write memory.
class Tiles {
 public:
  explicit Tiles(int64_t rows) {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 7; ++i) config.rows[i] = uint8_t(rows);
    config.rows[right] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  static constexpr int left = 6, right = 7;  // registers; sums are 0..5

  template <int i>
  FEWBIT_INLINE_MEMBER void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(i));
  }
  template <int i>
  FEWBIT_INLINE_MEMBER void load(const void* p) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(i), "r"(p), "r"(int64_t(64)) : "memory");
  }
  template <int i>
  FEWBIT_INLINE_MEMBER void store(int32_t* p) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(i), "r"(p), "r"(int64_t(64)) : "memory");
  }
  template <int sum, bool signed_right>
  FEWBIT_INLINE_MEMBER void dot() {
    if constexpr (signed_right)
      asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
    else
      asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
  }
};

#else

class Tiles {
 public:
  explicit Tiles(int64_t rows) : rows_(rows) {}

  static constexpr int left = 6, right = 7;

  template <int i>
  void zero() {
    __builtin_memset(tile_[i], 0, tile_bytes);
  }
  template <int i>
  void load(const void* p) {
    __builtin_memcpy(tile_[i], p, tile_bytes);
  }
  template <int i>
  void store(int32_t* p) {
    __builtin_memcpy(p, tile_[i], tile_bytes);
  }
  template <int sum, bool signed_right>
  void dot() {
    using Right = typename Choose<signed_right>::type;
    const int8_t* a = reinterpret_cast<const int8_t*>(tile_[left]);
    const Right* b = reinterpret_cast<const Right*>(tile_[right]);
    for (int64_t r = 0; r < rows_; ++r)
      for (int k = 0; k < 64; ++k)
        for (int n = 0; n < 16; ++n)
          tile_[sum][r * 16 + n] += int32_t(a[r * 64 + k]) * b[k / 4 * 64 + 4 * n + k % 4];
  }

 private:
  template <bool>
  struct Choose {
    using type = int8_t;
  };
  int64_t rows_;
  int32_t tile_[8][tile_bytes / 4];
};
template <>
struct Tiles::Choose<false> {
  using type = uint8_t;
};

#endif

}  // namespace fewbit::cpu::FEWBIT_ISA
#endif
