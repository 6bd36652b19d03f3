// The float part of LLM.int8() (arXiv 2208.07339): columns of x with outliers meet float weights.
//
//   out[m, n] = sum_{k not in O} int8 part + sum_{k in O} x[m, k] w[n, k] + bias[n]
//
// O: columns with some |x[m, k]| >= threshold, or given. w is the float column where it was kept,
// else (q - z) s from the packed codes. The int8 part is W8A8Linear with the columns of O left out
// of the quantisation of x; this file computes O and the second sum, in float32, in
// an order that depends on O alone.
#pragma once
#include "fewbit/dtype.h"
#include "fewbit/kernel.h"
#include "fewbit/layout.h"

namespace fewbit {

struct OutlierColumns {
  const void* x;  // [m, columns] of dtype
  uint8_t* flag;  // [columns]: 1 where some |x| >= threshold, or x is not finite
  float threshold;
  DType dtype;
  int64_t m;
  int64_t columns;

  static constexpr int64_t block = 256;  // columns per task
  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return ceil_div(columns, block); }
};

FEWBIT_KERNEL(OutlierColumns)

// Where an outlier column is.
struct Outlier {
  int64_t column;
  int64_t group;
  int64_t word;       // of its unit in a panel's words
  int shift;          // of its code in the word
  const float* kept;  // w[:, column] as [rows]; or null: from the codes
};

struct OutlierGather {
  const void* x;           // [m, columns] of dtype
  const Outlier* outlier;  // [outliers]
  float* out;              // [m, outliers]
  DType dtype;
  int64_t m;
  int64_t columns;
  int64_t outliers;

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return m; }
};

FEWBIT_KERNEL(OutlierGather)

struct OutlierProduct {
  const float* x;             // [m, outliers], from OutlierGather
  const Outlier* outlier;     // [outliers], columns ascending
  const uint32_t* packed;     // 8-bit codes, [panels, units, 16]
  const void* scale;          // [panels, groups, 16] of scale_dtype
  const uint8_t* zero_point;  // [panels, groups, 16]
  float* out;                 // [panels, rows, 16] of a window of the product: all or part of it
  DType scale_dtype;
  int64_t first_row, first_panel, rows;  // the window
  int64_t begin, end;                    // the rows of one call
  int64_t outliers;
  PackedLayout layout;
  int64_t groups, panel_words;  // the layout's: each costs divisions, and a call may be short

  FEWBIT_ALWAYS_INLINE int64_t at(int64_t row, int64_t panel) const {  // in out
    return ((panel - first_panel) * rows + row - first_row) * panel_rows;
  }
  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return layout.panels(); }
};

FEWBIT_KERNEL(OutlierProduct)

}  // namespace fewbit
