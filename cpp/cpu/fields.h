// Bit tricks of pack_fields and unpack_fields. Included by kernel files only.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace fewbit::cpu::FEWBIT_ISA {

static constexpr int nibble_row[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // row of nibble i

// The low `ones` bits of every `period` bits.
static constexpr uint64_t every(int ones, int period) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += period) mask |= ((uint64_t(1) << ones) - 1) << at;
  return mask;
}

// Eight bytes close up to 8 * Bits bits: neighbours first, then pairs, then quads.
template <int Bits>
static inline uint64_t squeeze(uint64_t x) {
  constexpr int gap = 8 - Bits;
  constexpr uint64_t a = every(Bits, 16), b = every(2 * Bits, 32), c = every(4 * Bits, 64);
  x = (x & a) | ((x >> gap) & (a << Bits));
  x = (x & b) | ((x >> (2 * gap)) & (b << (2 * Bits)));
  return (x & c) | ((x >> (4 * gap)) & (c << (4 * Bits)));
}

template <int Bits>
static inline uint64_t spread(uint64_t x) {
  constexpr int gap = 8 - Bits;
  constexpr uint64_t a = every(Bits, 16), b = every(2 * Bits, 32), c = every(4 * Bits, 64);
  x = (x & c) | ((x & (c << (4 * Bits))) << (4 * gap));
  x = (x & b) | ((x & (b << (2 * Bits))) << (2 * gap));
  return (x & a) | ((x & (a << Bits)) << gap);
}

}  // namespace fewbit::cpu::FEWBIT_ISA
