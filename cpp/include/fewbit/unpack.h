// The packed layout of layout.h back to canonical codes, scales and zero points.
#pragma once
#include "fewbit/kernel.h"
#include "fewbit/layout.h"

namespace fewbit {

struct Unpack {
  const uint32_t* packed;           // [panels, units, unit_words, 16]
  const void* panel_scale;          // [panels, groups, 16], 2- or 4-byte elements
  const uint8_t* panel_zero_point;  // [panels, groups, 16]
  uint8_t* q;                       // [rows, columns]
  void* scale;                      // [rows, groups], elements as panel_scale
  uint8_t* zero_point;              // [rows, groups]
  int scale_bytes;
  bool stream;  // q is larger than the caches and in whole lines
  PackedLayout layout;

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return layout.panels(); }
};

FEWBIT_KERNEL(Unpack)

}  // namespace fewbit
