// Canonical codes to the packed layout of layout.h, with scales and zero points in panel order.
#pragma once
#include "fewbit/kernel.h"
#include "fewbit/layout.h"

namespace fewbit {

struct Pack {
  const uint8_t* q;           // [rows, columns], codes 0..2^bits - 1
  const void* scale;          // [rows, groups], 2- or 4-byte elements
  const uint8_t* zero_point;  // [rows, groups]
  uint32_t* packed;           // [panels, units, unit_words, 16]
  void* panel_scale;          // [panels, groups, 16], elements as scale
  uint8_t* panel_zero_point;  // [panels, groups, 16]
  uint8_t* all;               // [panels]: the panel's codes ored together, to find one out of range
  int scale_bytes;            // 2 or 4
  bool stream;                // packed is larger than the caches
  PackedLayout layout;

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return layout.panels(); }
};

FEWBIT_KERNEL(Pack)

}  // namespace fewbit
