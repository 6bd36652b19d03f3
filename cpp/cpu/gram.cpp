#include "fewbit/gram.h"

#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

constexpr int lanes = 16;  // channels of a panel
// Vectors of a panel, rows of one micro-kernel step, and panels across: as many chains as the
// registers hold.
template <class Real>
constexpr int vectors = lanes / Vector<Real>::width;
#if FEWBIT_ISA_LEVEL >= 2
template <class Real>
constexpr int step_rows = 8;
template <class Real>
constexpr int step_panels = 2 / vectors<Real>;
#elif FEWBIT_ISA_LEVEL == 1
template <class Real>
constexpr int step_rows = 8 / vectors<Real>;
template <class Real>
constexpr int step_panels = 1;
#else
template <class Real>
constexpr int step_rows = 4;
template <class Real>
constexpr int step_panels = 1;
#endif
constexpr int64_t tile_tokens = 128;  // a step's panels (16 KiB) stay in L1 while rows pass

// Rows [16 pi + r0, +step_rows), panels pj .. pj + step_panels - 1, tokens [t0, t1).
template <class Real>
static void tile(const Gram<Real>& a, int64_t pi, int r0, int64_t pj, int64_t t0, int64_t t1) {
  using V = Vector<Real>;
  constexpr int rows = step_rows<Real>, panels = step_panels<Real>;
  constexpr int across = panels * vectors<Real>, wide = panels * lanes;
  const int64_t size = a.tokens * lanes;
  const float* xi = a.x + pi * size + r0;
  const float* xj[panels];  // a panel past the last is the last again, its results dropped
  for (int p = 0; p < panels; ++p)
    xj[p] = a.x + (pj + p < a.panels() ? pj + p : a.panels() - 1) * size;
  const int64_t row0 = pi * lanes + r0, col0 = pj * lanes;
  const bool whole = row0 + rows <= a.channels && col0 + wide <= a.channels;
  Real corner[rows][wide] = {};
  Real* g = a.g + row0 * a.channels + col0;
  const auto copy = [&](bool in) {
    for (int r = 0; r < rows && row0 + r < a.channels; ++r)
      for (int c = 0; c < wide && col0 + c < a.channels; ++c)
        (in ? corner[r][c] : g[r * a.channels + c]) = in ? g[r * a.channels + c] : corner[r][c];
  };
  if (!whole) copy(true);
  Real* to = whole ? g : corner[0];
  const int64_t stride = whole ? a.channels : wide;
  V sum[rows][across];
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < across; ++c) sum[r][c] = V::load(to + r * stride + c * V::width);
  for (int64_t t = t0; t < t1; ++t) {
    V right[across];
    for (int c = 0; c < across; ++c)
      right[c] = V::load(xj[c / vectors<Real>] + t * lanes + c % vectors<Real> * V::width);
    for (int r = 0; r < rows; ++r) {
      const V left = V::set(Real(xi[t * lanes + r]));
      for (int c = 0; c < across; ++c) sum[r][c] = fma(left, right[c], sum[r][c]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < across; ++c) sum[r][c].store(to + r * stride + c * V::width);
  if (!whole) copy(false);
}

template <class T>
static void fill_panel(const GramPanels& a, int64_t panel) {
  const int64_t first = panel * lanes;
  const int64_t n = first + lanes <= a.channels ? lanes : a.channels - first;
  float* out = a.out + panel * a.tokens * lanes;
  for (int64_t t = 0; t < a.tokens; ++t) {
    const T* x = static_cast<const T*>(a.x) + t * a.channels + first;
    if (n == lanes) {
      for (int i = 0; i < lanes; i += F32::width) F32::load(x + i).store(out + t * lanes + i);
    } else {
      for (int64_t i = 0; i < n; ++i) out[t * lanes + i] = to_float(x[i]);
      for (int64_t i = n; i < lanes; ++i) out[t * lanes + i] = 0.0f;
    }
  }
}

void kernel(const GramPanels& a, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel)
    with_type(a.dtype, [&](auto* t) { fill_panel<element<decltype(t)>>(a, panel); });
}

template <class Real>
static void add(const Gram<Real>& a, int64_t begin, int64_t end) {
  static_assert(Gram<Real>::panel == lanes);
  constexpr int64_t block = Gram<Real>::block, across = step_panels<Real>;
  const int64_t panels = a.panels(), blocks = a.blocks();
  // Task number -> square (bi, bj) of the upper triangle, row by row.
  int64_t bi = 0, left = begin;
  while (bi < blocks && left >= blocks - bi) left -= blocks - bi++;
  int64_t bj = bi + left;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t i1 = (bi + 1) * block < panels ? (bi + 1) * block : panels;
    const int64_t j1 = (bj + 1) * block < panels ? (bj + 1) * block : panels;
    for (int64_t t0 = 0; t0 < a.tokens; t0 += tile_tokens) {
      const int64_t t1 = t0 + tile_tokens < a.tokens ? t0 + tile_tokens : a.tokens;
      for (int64_t pj = bj * block; pj < j1; pj += across)
        // Tiles wholly below the diagonal are left to the mirror.
        for (int64_t pi = bi * block; pi < i1 && pi < pj + across; ++pi)
          for (int r0 = 0; r0 < lanes; r0 += step_rows<Real>) tile(a, pi, r0, pj, t0, t1);
    }
    if (++bj == blocks) bj = ++bi;
  }
}

void kernel(const Gram<float>& a, int64_t begin, int64_t end) { add(a, begin, end); }
void kernel(const Gram<double>& a, int64_t begin, int64_t end) { add(a, begin, end); }

template <class Real>
static void mirror(const GramMirror<Real>& a, int64_t begin, int64_t end) {
  constexpr int64_t block = GramMirror<Real>::block;
  const int64_t n = a.channels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t r0 = task * block;
    const int64_t r1 = r0 + block < n ? r0 + block : n;
    for (int64_t c0 = 0; c0 < r1; c0 += block)
      for (int64_t r = r0; r < r1; ++r)
        for (int64_t c = c0; c < c0 + block && c < r; ++c) a.g[r * n + c] = a.g[c * n + r];
  }
}

void kernel(const GramMirror<float>& a, int64_t begin, int64_t end) { mirror(a, begin, end); }
void kernel(const GramMirror<double>& a, int64_t begin, int64_t end) { mirror(a, begin, end); }

}  // namespace fewbit::cpu::FEWBIT_ISA
