// x += e m for row panels in fixed order: the matrix product of the second-order solvers.
#pragma once
#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

constexpr int update_lanes = 16;  // rows of a panel
constexpr int update_vectors = update_lanes / F32::width;

// Columns and panels of one register tile: as many chains as the registers hold.
#if FEWBIT_ISA_LEVEL == 2
constexpr int update_columns = 12, update_panels = 2;
#elif FEWBIT_ISA_LEVEL == 1
constexpr int update_columns = 6, update_panels = 1;
#else
constexpr int update_columns = 4, update_panels = 1;
#endif

template <int panels>
static void update_tile(const float* e, int64_t e_stride, float* x, int64_t x_stride,
                        const float* m, int64_t depth) {
  constexpr int lanes = panels * update_vectors;
  F32 sum[lanes][update_columns];
  for (int l = 0; l < lanes; ++l)
    for (int c = 0; c < update_columns; ++c)
      sum[l][c] = F32::load(x + l / update_vectors * x_stride + c * update_lanes +
                            l % update_vectors * F32::width);
  for (int64_t j = 0; j < depth; ++j) {
    F32 left[lanes];
    for (int l = 0; l < lanes; ++l)
      left[l] = F32::load(e + l / update_vectors * e_stride + j * update_lanes +
                          l % update_vectors * F32::width);
    for (int c = 0; c < update_columns; ++c) {
      const F32 right = F32::set(m[j * update_columns + c]);
      for (int l = 0; l < lanes; ++l) sum[l][c] = fma(left[l], right, sum[l][c]);
    }
  }
  for (int l = 0; l < lanes; ++l)
    for (int c = 0; c < update_columns; ++c)
      sum[l][c].store(x + l / update_vectors * x_stride + c * update_lanes +
                      l % update_vectors * F32::width);
}

// x[p][k][lane] += sum_j e[p][j][lane] m[j][k] for p < panels, j < depth <= max_depth, k < width,
// each a chain of fused multiply-adds in order of j. e and x have e_stride and x_stride floats per
// panel, m has `ld` per row; x must be readable and writable up to update_columns behind width.
template <int64_t max_depth>
static void update(const float* e, int64_t e_stride, float* x, int64_t x_stride, int64_t panels,
                   const float* m, int64_t ld, int64_t depth, int64_t width) {
  // Rows of m may all lie on the same cache sets, so strips of them are copied, and the next strip
  // is asked for while this one is in use: no hardware prefetch follows strides this long.
  constexpr int64_t tiles = 4, strip = tiles * update_columns;
  float copy[tiles][max_depth * update_columns];
  for (int64_t first = 0; first < width; first += strip) {
    for (int64_t j = 0; j < depth; ++j) {
      const float* from = m + j * ld + first;
      for (int64_t t = 0; t < tiles; ++t) {
        float* to = copy[t] + j * update_columns;
        const int64_t n = width - first - t * update_columns;
        for (int64_t c = 0; c < update_columns && n >= update_columns; ++c)
          to[c] = from[t * update_columns + c];
        for (int64_t c = 0; c < update_columns && n < update_columns; ++c)
          to[c] = c < n ? from[t * update_columns + c] : 0.0f;
      }
      for (int64_t c = 0; c < strip; c += 16)
        if (first + strip + c < width) __builtin_prefetch(from + strip + c);
    }
    for (int64_t p = 0; p < panels;) {
      const bool wide = p + update_panels <= panels;
      for (int64_t t = 0; t < tiles && first + t * update_columns < width; ++t) {
        float* to = x + p * x_stride + (first + t * update_columns) * update_lanes;
        const float* from = e + p * e_stride;
        if (wide)
          update_tile<update_panels>(from, e_stride, to, x_stride, copy[t], depth);
        else
          update_tile<1>(from, e_stride, to, x_stride, copy[t], depth);
      }
      p += wide ? update_panels : 1;
    }
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
