#include "fewbit/unpack_fields.h"

#include "fields.h"

namespace fewbit::cpu::FEWBIT_ISA {

template <int Bits>
static void unpack_row(const uint8_t* in, uint8_t* q, int64_t columns, int64_t bytes) {
  int64_t k = 0, at = 0;
  for (; k + 8 <= columns && at + 8 <= bytes; k += 8, at += Bits) {
    uint64_t x;
    __builtin_memcpy(&x, in + at, 8);
    x = spread<Bits>(x);
    __builtin_memcpy(q + k, &x, 8);
  }
  for (; k < columns; ++k) {
    const int64_t bit = k * Bits;
    unsigned field = in[bit / 8];
    if (bit % 8 + Bits > 8) field |= unsigned(in[bit / 8 + 1]) << 8;
    q[k] = uint8_t((field >> (bit % 8)) & ((1u << Bits) - 1));
  }
}

static void deinterleave(const UnpackFields& a, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const uint32_t* in = a.words + c * a.columns;
    for (int i = 0; i < 8; ++i) {
      uint8_t* q = a.q + (c * 8 + nibble_row[i]) * a.columns;
      for (int64_t k = 0; k < a.columns; ++k) q[k] = uint8_t((in[k] >> (4 * i)) & 15u);
    }
  }
}

void kernel(const UnpackFields& a, int64_t begin, int64_t end) {
  if (a.interleave) return deinterleave(a, begin, end);
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* in = reinterpret_cast<const uint8_t*>(a.words + r * a.row_words);
    uint8_t* q = a.q + r * a.columns;
    switch (a.bits) {
      case 2: unpack_row<2>(in, q, a.columns, a.row_words * 4); break;
      case 3: unpack_row<3>(in, q, a.columns, a.row_words * 4); break;
      case 4: unpack_row<4>(in, q, a.columns, a.row_words * 4); break;
      case 5: unpack_row<5>(in, q, a.columns, a.row_words * 4); break;
      case 6: unpack_row<6>(in, q, a.columns, a.row_words * 4); break;
      case 7: unpack_row<7>(in, q, a.columns, a.row_words * 4); break;
      default: unpack_row<8>(in, q, a.columns, a.row_words * 4);
    }
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
