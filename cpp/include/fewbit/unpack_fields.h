// The words of on-disk formats back to codes: the inverse of pack_fields.h, same layouts.
#pragma once
#include "fewbit/kernel.h"

namespace fewbit {

struct UnpackFields {
  const uint32_t* words;  // [rows, row_words]; interleaved [rows / 8, columns]
  uint8_t* q;             // [rows, columns]
  int64_t rows;
  int64_t columns;
  int64_t row_words;  // at least ceil(columns * bits / 32)
  int bits;           // 2..8
  bool interleave;

  int64_t tasks() const { return interleave ? rows / 8 : rows; }
};

FEWBIT_KERNEL(UnpackFields)

}  // namespace fewbit
