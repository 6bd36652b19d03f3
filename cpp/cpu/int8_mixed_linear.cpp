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
      for (int64_t o = 0; o < a.outliers; ++o) a.out[m * a.outliers + o] = to_float(x[a.column[o]]);
    }
  });
}

// Outlier columns decoded at a time; 4 rows share a load of them.
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

void kernel(const OutlierProduct& a, int64_t begin, int64_t end) {
  const PackedLayout& l = a.layout;
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t o0 = 0; o0 < a.outliers; o0 += span) {
      const int64_t n = a.outliers - o0 < span ? a.outliers - o0 : span;
      float w[span * panel_rows] = {};
      for (int64_t o = 0; o < n; ++o) {
        const int64_t k = a.column[o0 + o], g = k / l.group_size;
        const int64_t first = panel * panel_rows;
        if (const float* kept = a.kept[o0 + o]) {
          for (int64_t r = 0; r < panel_rows && first + r < l.rows; ++r)
            w[o * panel_rows + r] = kept[first + r];
          continue;
        }
        const int64_t in_group = k - g * l.group_size;
        const uint32_t* unit =
            a.packed + panel * l.panel_words() + (g * l.group_units() + in_group / 4) * panel_rows;
        const int64_t at = (panel * l.groups() + g) * panel_rows;
        for (int v = 0; v < panel_rows; v += F32::width) {
          const F32 q = low_bits<8>(load_u32(unit + v) >> int(8 * (in_group % 4)));
          const F32 s = load_scale(a.scale, a.scale_dtype, at + v);
          ((q - F32::load(a.zero_point + at + v)) * s).store(w + o * panel_rows + v);
        }
      }
      int64_t m = 0;
      for (; m + 4 <= a.m; m += 4) add_rows<4>(a, m, o0, n, w, panel);
      for (; m < a.m; ++m) add_rows<1>(a, m, o0, n, w, panel);
    }
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
