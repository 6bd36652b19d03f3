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

constexpr int64_t span = 64;                          // outlier columns decoded at a time
constexpr int block = FEWBIT_ISA_LEVEL >= 2 ? 8 : 4;  // rows that share a load of them

// In two sums, of every other outlier: one alone is a chain as long as there are outliers.
template <int rows>
FEWBIT_INLINE void add_rows(const OutlierProduct& a, int64_t m, int64_t o0, int64_t n,
                            const float* w, int64_t panel) {
  float* out = a.out + a.at(m, panel);
  const float* x = a.x + m * a.outliers + o0;
  for (int v = 0; v < panel_rows; v += F32::width) {
    F32 sum[2][rows];
    for (int r = 0; r < rows; ++r) {
      sum[0][r] = o0 == 0 ? F32::zero() : F32::load(out + r * panel_rows + v);
      sum[1][r] = F32::zero();
    }
    const auto add = [&](int64_t o, F32(&to)[rows]) {
      const F32 right = F32::load(w + o * panel_rows + v);
      for (int r = 0; r < rows; ++r) to[r] = fma(F32::set(x[r * a.outliers + o]), right, to[r]);
    };
    int64_t o = 0;
    for (; o + 2 <= n; o += 2) {
      add(o, sum[0]);
      add(o + 1, sum[1]);
    }
    if (o < n) add(o, sum[0]);
    for (int r = 0; r < rows; ++r) (sum[0][r] + sum[1][r]).store(out + r * panel_rows + v);
  }
}

// Calls use(i, v, weights) for all vectors v of outliers o0 + i, i < n, of one panel.
template <class F>
FEWBIT_INLINE void decode(const OutlierProduct& a, int64_t panel, int64_t o0, int64_t n,
                          const F& use) {
  const int64_t first = panel * panel_rows, rows = a.layout.rows - first;
  const uint32_t* packed = a.packed + panel * a.panel_words;
  const Outlier* o = a.outlier + o0;
  for (int64_t i = 0; i < n;) {
    if (o[i].kept) {
      const float* from = o[i].kept + first;
      float part[panel_rows];
      for (int64_t r = 0; r < panel_rows && rows < panel_rows; ++r)
        part[r] = r < rows ? from[r] : 0;
      if (rows < panel_rows) from = part;
      for (int v = 0; v < vectors; ++v) use(i, v, F32::load(from + v * F32::width));
      ++i;
      continue;
    }
    const int64_t group = o[i].group;  // for all that follow in it
    F32 s[vectors], z[vectors];
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = (panel * a.groups + group) * panel_rows + v * F32::width;
      s[v] = load_scale(a.scale, a.scale_dtype, at);
      z[v] = F32::load(a.zero_point + at);
    }
    for (; i < n && o[i].group == group && !o[i].kept; ++i)
      for (int v = 0; v < vectors; ++v) {
        const F32 q = low_bits<8>(load_u32(packed + o[i].word + v * F32::width) >> o[i].shift);
        use(i, v, (q - z[v]) * s[v]);
      }
  }
}

// add_rows for a single row, which needs no copy of the decoded columns.
static void add_row(const OutlierProduct& a, int64_t m, int64_t o0, int64_t n, int64_t panel) {
  float* out = a.out + a.at(m, panel);
  const float* x = a.x + m * a.outliers + o0;
  F32 sum[vectors], other[vectors];  // they take turns
  for (int v = 0; v < vectors; ++v) {
    sum[v] = o0 == 0 ? F32::zero() : F32::load(out + v * F32::width);
    other[v] = F32::zero();
  }
  decode(a, panel, o0, n, [&](int64_t i, int v, F32 w) {
    const F32 more = fma(F32::set(x[i]), w, sum[v]);
    sum[v] = other[v];
    other[v] = more;
  });
  for (int v = 0; v < vectors; ++v) (sum[v] + other[v]).store(out + v * F32::width);
}

void kernel(const OutlierProduct& a, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t o0 = 0; o0 < a.outliers; o0 += span) {
      const int64_t n = a.outliers - o0 < span ? a.outliers - o0 : span;
      if (a.end - a.begin == 1) {
        add_row(a, a.begin, o0, n, panel);
        continue;
      }
      float w[span * panel_rows];  // [outlier][16]
      decode(a, panel, o0, n, [&](int64_t i, int v, F32 weights) {
        weights.store(w + i * panel_rows + v * F32::width);
      });
      int64_t m = a.begin;
      for (; m + block <= a.end; m += block) add_rows<block>(a, m, o0, n, w, panel);
      for (; m < a.end; ++m) add_rows<1>(a, m, o0, n, w, panel);
    }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
