#include "fewbit/int8_mixed_linear.h"

#include "panels.h"

namespace fewbit::cpu::FEWBIT_ISA {

template <class T>
static void flag_columns(const OutlierColumns& a, int64_t first, int64_t last) {
  float top[OutlierColumns::block] = {};
  for (int64_t m = 0; m < a.m; ++m) {
    const T* x = static_cast<const T*>(a.x) + m * a.columns;
    int64_t i = first;
    for (; i + F32::width <= last; i += F32::width)  // a NaN, the first operand, would be lost
      max(F32::load(top + i - first), abs(F32::load(x + i))).store(top + i - first);
    for (; i < last; ++i) {
      const float v = abs_of(to_float(x[i]));
      top[i - first] = top[i - first] > v ? top[i - first] : v;
    }
  }
  for (int64_t i = first; i < last; ++i) a.flag[i] = top[i - first] < a.threshold ? 0 : 1;
}

void kernel(const OutlierColumns& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * OutlierColumns::block;
    const int64_t last =
        first + OutlierColumns::block < a.columns ? first + OutlierColumns::block : a.columns;
    with_type(a.dtype, [&](auto* t) { flag_columns<element<decltype(t)>>(a, first, last); });
  }
}

void kernel(const OutlierGather& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto* t) {
    for (int64_t m = begin; m < end; ++m) {
      const auto* x = static_cast<const element<decltype(t)>*>(a.x) + m * a.columns;
      for (int64_t o = 0; o < a.outliers; ++o)
        a.out[m * a.outliers + o] = to_float(x[a.outlier[o].column]);
    }
  });
}

// Outlier columns decoded at a time; 8 rows share a load of them.
constexpr int64_t span = 64;

template <int rows>
FEWBIT_INLINE void add_rows(const OutlierProduct& a, int64_t m, int64_t o0, int64_t n,
                            const float* w, int64_t panel) {
  const int64_t stride = a.layout.panels() * panel_rows;
  float* out = a.out + m * stride + panel * panel_rows;
  for (int v = 0; v < panel_rows; v += F32::width) {
    F32 sum[rows];
    for (int r = 0; r < rows; ++r) sum[r] = o0 == 0 ? F32::zero() : F32::load(out + r * stride + v);
    for (int64_t o = 0; o < n; ++o) {
      const F32 right = F32::load(w + o * panel_rows + v);
      for (int r = 0; r < rows; ++r)
        sum[r] = fma(F32::set(a.x[(m + r) * a.outliers + o0 + o]), right, sum[r]);
    }
    for (int r = 0; r < rows; ++r) sum[r].store(out + r * stride + v);
  }
}

// Columns of one panel to w[outlier][16].
static void decode(const OutlierProduct& a, int64_t panel, int64_t o0, int64_t n, float* w) {
  const PackedLayout& l = a.layout;
  const int64_t first = panel * panel_rows;
  int64_t group = -1;
  F32 s[vectors], z[vectors];
  for (int v = 0; v < vectors; ++v) s[v] = z[v] = F32::zero();
  for (int64_t o = 0; o < n; ++o, w += panel_rows) {
    const Outlier& outlier = a.outlier[o0 + o];
    if (outlier.kept) {
      for (int64_t r = 0; r < panel_rows; ++r)
        w[r] = first + r < l.rows ? outlier.kept[first + r] : 0.0f;
      continue;
    }
    const uint32_t* unit = a.packed + panel * l.panel_words() + outlier.word;
    const int64_t at = (panel * l.groups() + outlier.group) * panel_rows;
    for (int v = 0; v < vectors; ++v) {
      if (outlier.group != group) {
        s[v] = load_scale(a.scale, a.scale_dtype, at + v * F32::width);
        z[v] = F32::load(a.zero_point + at + v * F32::width);
      }
      const int shift = int(8 * (outlier.column - outlier.group * l.group_size) % 32);
      const F32 q = low_bits<8>(load_u32(unit + v * F32::width) >> shift);
      ((q - z[v]) * s[v]).store(w + v * F32::width);
    }
    group = outlier.group;
  }
}

void kernel(const OutlierProduct& a, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t o0 = 0; o0 < a.outliers; o0 += span) {
      const int64_t n = a.outliers - o0 < span ? a.outliers - o0 : span;
      float w[span * panel_rows];
      decode(a, panel, o0, n, w);
      int64_t m = 0;
      for (; m + 8 <= a.m; m += 8) add_rows<8>(a, m, o0, n, w, panel);
      for (; m < a.m; ++m) add_rows<1>(a, m, o0, n, w, panel);
    }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
