#include "fewbit/gram.h"

#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

// Rows of one micro-kernel step, and panels across: as many chains as the registers hold.
#if FEWBIT_ISA_LEVEL >= 2
constexpr int step_rows = 8, step_panels = 2;
#else
constexpr int step_rows = 4, step_panels = 1;
#endif
constexpr int vectors = int(Gram::panel) / F32::width;
constexpr int64_t tile_tokens = 128;  // a step's panels (16 KiB) stay in L1 while rows pass

// Rows [16 pi + r0, +step_rows), panels pj .. pj + step_panels - 1, tokens [t0, t1).
static void tile(const Gram& a, int64_t pi, int r0, int64_t pj, int64_t t0, int64_t t1) {
  constexpr int across = step_panels * vectors, wide = step_panels * int(Gram::panel);
  const int64_t size = a.tokens * Gram::panel;
  const float* xi = a.x + pi * size + r0;
  const float* xj[step_panels];  // a panel past the last is the last again, its results dropped
  for (int p = 0; p < step_panels; ++p)
    xj[p] = a.x + (pj + p < a.panels() ? pj + p : a.panels() - 1) * size;
  const int64_t row0 = pi * Gram::panel + r0, col0 = pj * Gram::panel;
  const bool whole = row0 + step_rows <= a.channels && col0 + wide <= a.channels;
  float corner[step_rows][wide] = {};
  float* g = a.g + row0 * a.channels + col0;
  const auto copy = [&](bool in) {
    for (int r = 0; r < step_rows && row0 + r < a.channels; ++r)
      for (int c = 0; c < wide && col0 + c < a.channels; ++c)
        (in ? corner[r][c] : g[r * a.channels + c]) = in ? g[r * a.channels + c] : corner[r][c];
  };
  if (!whole) copy(true);
  float* to = whole ? g : corner[0];
  const int64_t stride = whole ? a.channels : wide;
  F32 sum[step_rows][across];
  for (int r = 0; r < step_rows; ++r)
    for (int c = 0; c < across; ++c) sum[r][c] = F32::load(to + r * stride + c * F32::width);
  for (int64_t t = t0; t < t1; ++t) {
    F32 right[across];
    for (int c = 0; c < across; ++c)
      right[c] = F32::load(xj[c / vectors] + t * Gram::panel + c % vectors * F32::width);
    for (int r = 0; r < step_rows; ++r) {
      const F32 left = F32::set(xi[t * Gram::panel + r]);
      for (int c = 0; c < across; ++c) sum[r][c] = fma(left, right[c], sum[r][c]);
    }
  }
  for (int r = 0; r < step_rows; ++r)
    for (int c = 0; c < across; ++c) sum[r][c].store(to + r * stride + c * F32::width);
  if (!whole) copy(false);
}

template <class T>
static void fill_panel(const GramPanels& a, int64_t panel) {
  const int64_t first = panel * Gram::panel;
  const int64_t n = first + Gram::panel <= a.channels ? Gram::panel : a.channels - first;
  float* out = a.out + panel * a.tokens * Gram::panel;
  for (int64_t t = 0; t < a.tokens; ++t) {
    const T* x = static_cast<const T*>(a.x) + t * a.channels + first;
    if (n == Gram::panel) {
      for (int i = 0; i < Gram::panel; i += F32::width)
        F32::load(x + i).store(out + t * Gram::panel + i);
    } else {
      for (int64_t i = 0; i < n; ++i) out[t * Gram::panel + i] = to_float(x[i]);
      for (int64_t i = n; i < Gram::panel; ++i) out[t * Gram::panel + i] = 0.0f;
    }
  }
}

void kernel(const GramPanels& a, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel)
    with_type(a.dtype, [&](auto* t) { fill_panel<element<decltype(t)>>(a, panel); });
}

void kernel(const Gram& a, int64_t begin, int64_t end) {
  const int64_t panels = a.panels(), blocks = a.blocks();
  // Task number -> square (bi, bj) of the upper triangle, row by row.
  int64_t bi = 0, left = begin;
  while (bi < blocks && left >= blocks - bi) left -= blocks - bi++;
  int64_t bj = bi + left;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t i1 = (bi + 1) * Gram::block < panels ? (bi + 1) * Gram::block : panels;
    const int64_t j1 = (bj + 1) * Gram::block < panels ? (bj + 1) * Gram::block : panels;
    for (int64_t t0 = 0; t0 < a.tokens; t0 += tile_tokens) {
      const int64_t t1 = t0 + tile_tokens < a.tokens ? t0 + tile_tokens : a.tokens;
      for (int64_t pj = bj * Gram::block; pj < j1; pj += step_panels)
        // Tiles wholly below the diagonal are left to the mirror.
        for (int64_t pi = bi * Gram::block; pi < i1 && pi < pj + step_panels; ++pi)
          for (int r0 = 0; r0 < Gram::panel; r0 += step_rows) tile(a, pi, r0, pj, t0, t1);
    }
    if (++bj == blocks) bj = ++bi;
  }
}

void kernel(const GramMirror& a, int64_t begin, int64_t end) {
  const int64_t n = a.channels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t r0 = task * GramMirror::block;
    const int64_t r1 = r0 + GramMirror::block < n ? r0 + GramMirror::block : n;
    for (int64_t c0 = 0; c0 < r1; c0 += GramMirror::block)
      for (int64_t r = r0; r < r1; ++r)
        for (int64_t c = c0; c < c0 + GramMirror::block && c < r; ++c)
          a.g[r * n + c] = a.g[c * n + r];
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
