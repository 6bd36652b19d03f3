// Codes to the words of on-disk formats (python/fewbit/formats/bits.py names them).
//
// Dense stream: element i of a row occupies bits [bits i, bits i + bits) of the row's little-endian
// words; spare bits of the last word are 0. Interleaved (AWQ, 4 bits): word [c][k] holds rows
// 8c + order[i] of column k in its nibbles i = 0..7, order = 0 2 4 6 1 3 5 7.
// Codes above 2^bits - 1 run into their neighbours: the caller checks.
#pragma once
#include "fewbit/kernel.h"

namespace fewbit {

struct PackFields {
  const uint8_t* q;  // [rows, columns]
  uint32_t* words;   // [rows, ceil(columns * bits / 32)]; interleaved [rows / 8, columns]
  int64_t rows;
  int64_t columns;
  int bits;         // 2..8
  bool interleave;  // bits is 4, rows a multiple of 8

  int64_t tasks() const { return interleave ? rows / 8 : rows; }
};

FEWBIT_KERNEL(PackFields)

}  // namespace fewbit
