#include "fewbit/gram.h"

#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

// Rows of one micro-kernel step, and vectors across: as many chains as the registers hold.
#if FEWBIT_ISA_LEVEL == 2
constexpr int step_rows = 8, step_panels = 2;
#else
constexpr int step_rows = 4, step_panels = 1;
#endif
constexpr int vectors = int(Gram::panel) / F32::width;

// The tile of rows [16 pi + r0, +step_rows) and column panels pj .. pj + panels - 1.
template <int panels>
static void tile(const Gram& a, int64_t pi, int r0, int64_t pj) {
  constexpr int across = panels * vectors;
  const int64_t size = a.tokens * Gram::panel;
  const float* xi = a.x + pi * size + r0;
  const float* xj = a.x + pj * size;
  float corner[step_rows][panels * Gram::panel];
  // Edge tiles are computed whole in a copy: the padding channels of x are 0.
  const int64_t row0 = pi * Gram::panel + r0, col0 = pj * Gram::panel;
  for (int r = 0; r < step_rows; ++r)
    for (int c = 0; c < panels * Gram::panel; ++c)
      corner[r][c] = row0 + r < a.channels && col0 + c < a.channels
                         ? a.g[(row0 + r) * a.channels + col0 + c] : 0.0f;
  F32 sum[step_rows][across];
  for (int r = 0; r < step_rows; ++r)
    for (int c = 0; c < across; ++c) sum[r][c] = F32::load(&corner[r][c * F32::width]);
  for (int64_t t = 0; t < a.tokens; ++t) {
    F32 right[across];
    for (int c = 0; c < across; ++c)
      right[c] = F32::load(xj + (c / vectors) * size + t * Gram::panel + c % vectors * F32::width);
    for (int r = 0; r < step_rows; ++r) {
      const F32 left = F32::set(xi[t * Gram::panel + r]);
      for (int c = 0; c < across; ++c) sum[r][c] = fma(left, right[c], sum[r][c]);
    }
  }
  for (int r = 0; r < step_rows; ++r)
    for (int c = 0; c < across; ++c) sum[r][c].store(&corner[r][c * F32::width]);
  for (int r = 0; r < step_rows && row0 + r < a.channels; ++r)
    for (int c = 0; c < panels * Gram::panel && col0 + c < a.channels; ++c)
      if (col0 + c >= row0 + r) {
        a.g[(row0 + r) * a.channels + col0 + c] = corner[r][c];
        a.g[(col0 + c) * a.channels + row0 + r] = corner[r][c];
      }
}

template <class T>
static void fill_panel(const GramPanels& a, int64_t panel) {
  const int64_t first = panel * Gram::panel;
  const int64_t n = first + Gram::panel <= a.channels ? Gram::panel : a.channels - first;
  float* out = a.out + panel * a.tokens * Gram::panel;
  for (int64_t t = 0; t < a.tokens; ++t) {
    const T* x = static_cast<const T*>(a.x) + t * a.channels + first;
    for (int64_t i = 0; i < n; ++i) out[t * Gram::panel + i] = to_float(x[i]);
    for (int64_t i = n; i < Gram::panel; ++i) out[t * Gram::panel + i] = 0.0f;
  }
}

void kernel(const GramPanels& a, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel)
    with_type(a.dtype, [&](auto* t) { fill_panel<element<decltype(t)>>(a, panel); });
}

void kernel(const Gram& a, int64_t begin, int64_t end) {
  const int64_t panels = a.panels();
  for (int64_t task = begin; task < end; ++task) {
    // Long and short rows of the triangle alternate, so that equal ranges of tasks are equal work.
    const int64_t pi = task % 2 == 0 ? task / 2 : panels - 1 - task / 2;
    for (int64_t pj = pi; pj < panels;) {
      const bool wide = pj + step_panels <= panels;
      for (int r0 = 0; r0 < Gram::panel; r0 += step_rows) {
        if (wide) tile<step_panels>(a, pi, r0, pj);
        else tile<1>(a, pi, r0, pj);
      }
      pj += wide ? step_panels : 1;
    }
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
