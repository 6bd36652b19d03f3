// x += e m for row panels in fixed order: the matrix product of the second-order solvers.
#pragma once
#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

constexpr int update_lanes = 16;  // rows of a panel

// Vectors, columns and panels of one register tile: as many chains as the registers hold.
template <class Real>
constexpr int update_vectors = update_lanes / Vector<Real>::width;
#if FEWBIT_ISA_LEVEL >= 2
template <class Real>
constexpr int update_columns = 12;
template <class Real>
constexpr int update_panels = 2 / update_vectors<Real>;
#elif FEWBIT_ISA_LEVEL == 1
template <class Real>
constexpr int update_columns = 12 / update_vectors<Real>;
template <class Real>
constexpr int update_panels = 1;
#else
template <class Real>
constexpr int update_columns = 4;
template <class Real>
constexpr int update_panels = 1;
#endif

template <int panels, class Real>
static void update_tile(const Real* e, int64_t e_stride, Real* x, int64_t x_stride, const Real* m,
                        int64_t depth) {
  using V = Vector<Real>;
  constexpr int vectors = update_vectors<Real>, lanes = panels * vectors;
  constexpr int columns = update_columns<Real>;
  V sum[lanes][columns];
  for (int l = 0; l < lanes; ++l)
    for (int c = 0; c < columns; ++c)
      sum[l][c] = V::load(x + l / vectors * x_stride + c * update_lanes + l % vectors * V::width);
  for (int64_t j = 0; j < depth; ++j) {
    V left[lanes];
    for (int l = 0; l < lanes; ++l)
      left[l] = V::load(e + l / vectors * e_stride + j * update_lanes + l % vectors * V::width);
    for (int c = 0; c < columns; ++c) {
      const V right = V::set(m[j * columns + c]);
      for (int l = 0; l < lanes; ++l) sum[l][c] = fma(left[l], right, sum[l][c]);
    }
  }
  for (int l = 0; l < lanes; ++l)
    for (int c = 0; c < columns; ++c)
      sum[l][c].store(x + l / vectors * x_stride + c * update_lanes + l % vectors * V::width);
}

// x[p][k][lane] += sum_j e[p][j][lane] m[j][k] for p < panels, j < depth <= max_depth, k < width,
// each a chain of fused multiply-adds in order of j. e and x have e_stride and x_stride numbers per
// panel, m has `ld` per row; x must be readable and writable up to update_columns behind width.
template <int64_t max_depth, class Real>
static void update(const Real* e, int64_t e_stride, Real* x, int64_t x_stride, int64_t panels,
                   const Real* m, int64_t ld, int64_t depth, int64_t width) {
  // Rows of m may all lie on the same cache sets, so strips of them are copied, and the next strip
  // is asked for while this one is in use: no hardware prefetch follows strides this long.
  constexpr int columns = update_columns<Real>, most = update_panels<Real>;
  constexpr int64_t tiles = 4, strip = tiles * columns;
  Real copy[tiles][max_depth * columns];
  for (int64_t first = 0; first < width; first += strip) {
    for (int64_t j = 0; j < depth; ++j) {
      const Real* from = m + j * ld + first;
      for (int64_t t = 0; t < tiles; ++t) {
        Real* to = copy[t] + j * columns;
        const int64_t n = width - first - t * columns;
        for (int64_t c = 0; c < columns && n >= columns; ++c) to[c] = from[t * columns + c];
        for (int64_t c = 0; c < columns && n < columns; ++c)
          to[c] = c < n ? from[t * columns + c] : Real(0);
      }
      for (int64_t c = 0; c < strip; c += 64 / int64_t(sizeof(Real)))
        if (first + strip + c < width) __builtin_prefetch(from + strip + c);
    }
    for (int64_t p = 0; p < panels;) {
      const bool wide = p + most <= panels;
      for (int64_t t = 0; t < tiles && first + t * columns < width; ++t) {
        Real* to = x + p * x_stride + (first + t * columns) * update_lanes;
        const Real* from = e + p * e_stride;
        if (wide)
          update_tile<most>(from, e_stride, to, x_stride, copy[t], depth);
        else
          update_tile<1>(from, e_stride, to, x_stride, copy[t], depth);
      }
      p += wide ? most : 1;
    }
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
