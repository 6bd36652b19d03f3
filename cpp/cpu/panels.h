// What the packed matrix products share: scales of a panel in, rows of results out.
#pragma once
#include "codes.h"

namespace fewbit::cpu::FEWBIT_ISA {

constexpr int vectors = int(panel_rows) / F32::width;  // per panel

FEWBIT_INLINE F32 load_scale(const void* scale, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f16: return F32::load(static_cast<const Half*>(scale) + at);
    case DType::bf16: return F32::load(static_cast<const BFloat16*>(scale) + at);
    default: return F32::load(static_cast<const float*>(scale) + at);
  }
}

// Writes one vector of row m, columns from `column` on, with bias, in the output type.
template <class Args>
FEWBIT_INLINE void write(const Args& a, int64_t m, int64_t column, F32 v) {
  const int64_t n = a.layout.rows - column;
  with_type(a.dtype, [&](auto* t) {
    auto* out = static_cast<element<decltype(t)>*>(a.out) + m * a.layout.rows + column;
    if (n >= F32::width) {
      (a.bias ? v + F32::load(a.bias + column) : v).store(out);
    } else {
      for (int64_t i = 0; i < n; ++i)
        from_float(a.bias ? lane(v, int(i)) + a.bias[column + i] : lane(v, int(i)), out + i);
    }
  });
}

// The sums of a tile of `rows` rows and `across` vectors, the first of them vector number `vector`
// of the output. Rows from a.m on and vectors from `last` on are dropped.
template <int rows, int across, class Args>
FEWBIT_INLINE void write_tile(const Args& a, int64_t m, int64_t vector, int64_t last,
                              const F32 (&total)[rows][across]) {
  for (int r = 0; r < rows && m + r < a.m; ++r)
    for (int c = 0; c < across && vector + c < last; ++c)
      write(a, m + r, (vector + c) * F32::width, total[r][c]);
}

}  // namespace fewbit::cpu::FEWBIT_ISA
