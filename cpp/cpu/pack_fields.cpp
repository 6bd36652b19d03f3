#include "fewbit/pack_fields.h"

#include "fields.h"

namespace fewbit::cpu::FEWBIT_ISA {

// Eight codes are `Bits` bytes of the stream, so whole eights are plain byte stores.
template <int Bits>
static void pack_row(const uint8_t* q, uint8_t* out, int64_t columns, int64_t bytes) {
  int64_t k = 0, at = 0;
  for (; k + 8 <= columns && at + 8 <= bytes; k += 8, at += Bits) {
    uint64_t x;
    __builtin_memcpy(&x, q + k, 8);
    x = squeeze<Bits>(x);
    __builtin_memcpy(out + at, &x, 8);  // the bytes beyond are written next
  }
  for (int64_t i = at; i < bytes; ++i) out[i] = 0;
  for (; k < columns; ++k) {
    const int64_t bit = k * Bits;
    const unsigned field = unsigned(q[k]) << (bit % 8);
    out[bit / 8] = uint8_t(out[bit / 8] | field);
    if (bit % 8 + Bits > 8) out[bit / 8 + 1] = uint8_t(field >> 8);
  }
}

static void interleave(const PackFields& a, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const uint8_t* q = a.q + c * 8 * a.columns;
    uint32_t* out = a.words + c * a.columns;
    for (int64_t k = 0; k < a.columns; ++k) {
      uint32_t word = 0;
      for (int i = 0; i < 8; ++i) word |= uint32_t(q[nibble_row[i] * a.columns + k]) << (4 * i);
      out[k] = word;
    }
  }
}

void kernel(const PackFields& a, int64_t begin, int64_t end) {
  if (a.interleave) return interleave(a, begin, end);
  const int64_t words = (a.columns * a.bits + 31) / 32;
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* q = a.q + r * a.columns;
    uint8_t* out = reinterpret_cast<uint8_t*>(a.words + r * words);
    switch (a.bits) {
      case 2: pack_row<2>(q, out, a.columns, words * 4); break;
      case 3: pack_row<3>(q, out, a.columns, words * 4); break;
      case 4: pack_row<4>(q, out, a.columns, words * 4); break;
      case 5: pack_row<5>(q, out, a.columns, words * 4); break;
      case 6: pack_row<6>(q, out, a.columns, words * 4); break;
      case 7: pack_row<7>(q, out, a.columns, words * 4); break;
      default: pack_row<8>(q, out, a.columns, words * 4);
    }
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
