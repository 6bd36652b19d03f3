#include "fewbit/w4a16_linear.h"

#include "codes.h"

namespace fewbit::cpu::FEWBIT_ISA {

constexpr int vectors = int(panel_rows) / F32::width;  // per panel

// ---- activations -------------------------------------------------------------------------------

template <class T>
static void prepare(const W4A16Prepare& a, int64_t block) {
  const PackedLayout& l = a.layout;
  const int64_t rows = a.block_rows, padded = l.padded_columns();
  const int64_t group_columns = l.group_units() * unit_columns(l.bits);
  float* out = a.prepared + block * padded * rows;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t m = block * rows + r;
    if (m >= a.m) {
      for (int64_t k = 0; k < padded; ++k) out[k * rows + r] = 0.0f;
      continue;
    }
    const T* x = static_cast<const T*>(a.x) + m * l.columns;
    for (int64_t g = 0; g < l.groups(); ++g) {
      const int64_t start = g * l.group_size;
      const int64_t n = start + l.group_size <= l.columns ? l.group_size : l.columns - start;
      const int64_t last = g + 1 < l.groups() ? group_columns : padded - g * group_columns;
      float* to = out + g * group_columns * rows + r;
      float sum[8] = {};  // fixed order, eight chains
      for (int64_t k = 0; k < n; ++k) {
        const float v = to_float(x[start + k]);
        to[k * rows] = v;
        sum[k % 8] += v;
      }
      for (int64_t k = n; k < last; ++k) to[k * rows] = 0.0f;
      if (a.group_sum)
        a.group_sum[m * l.groups() + g] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) +
                                          ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    }
  }
}

void kernel(const W4A16Prepare& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block)
    with_type(a.dtype, [&](auto* t) { prepare<element<decltype(t)>>(a, block); });
}

// ---- shared ------------------------------------------------------------------------------------

FEWBIT_INLINE F32 load_scale(const W4A16Linear& a, int64_t at) {
  switch (a.scale_dtype) {
    case DType::f16: return F32::load(static_cast<const Half*>(a.scale) + at);
    case DType::bf16: return F32::load(static_cast<const BFloat16*>(a.scale) + at);
    default: return F32::load(static_cast<const float*>(a.scale) + at);
  }
}

// Writes 16 sums of row m, with bias, in the output type.
template <class T>
FEWBIT_INLINE void write(const W4A16Linear& a, int64_t m, int64_t panel, const float* sums) {
  const int64_t first = panel * panel_rows;
  const int64_t n = first + panel_rows <= a.layout.rows ? panel_rows : a.layout.rows - first;
  T* out = static_cast<T*>(a.out) + m * a.layout.rows + first;
  for (int64_t i = 0; i < n; ++i) from_float(a.bias ? sums[i] + a.bias[first + i] : sums[i], out + i);
}

FEWBIT_INLINE void write_row(const W4A16Linear& a, int64_t m, int64_t panel, const float* sums) {
  with_type(a.dtype, [&](auto* t) { write<element<decltype(t)>>(a, m, panel, sums); });
}

// ---- few rows: codes decoded in registers ------------------------------------------------------

template <int bits, int rows, int panels>
static void direct(const W4A16Linear& a, int64_t panel) {
  using Unit = UnitRows<bits>;
  constexpr int across = panels * vectors;
  const PackedLayout& l = a.layout;
  const int64_t groups = l.groups(), panel_words = l.panel_words();
  const uint32_t* packed = a.packed + panel * panel_words;
  const float* x = a.x;  // [padded_columns, rows]

  F32 total[rows][across];
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < across; ++c) total[r][c] = F32::zero();

  for (int64_t g = 0; g < groups; ++g) {
    const int64_t units = g + 1 < groups ? l.group_units() : l.last_units();
    F32 sum[rows][across];
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < across; ++c) sum[r][c] = F32::zero();
    for (int64_t u = 0; u < units; ++u) {
      Unit unit[across];
      for (int c = 0; c < across; ++c)
        unit[c] = Unit::load(packed + (c / vectors) * panel_words + c % vectors * F32::width);
#pragma GCC unroll 32
      for (int i = 0; i < Unit::columns; ++i) {
        F32 xb[rows];
        for (int r = 0; r < rows; ++r) xb[r] = F32::set(x[i * rows + r]);
        for (int c = 0; c < across; ++c) {
          const F32 q = unit[c].column(i);
          for (int r = 0; r < rows; ++r) sum[r][c] = fma(q, xb[r], sum[r][c]);
        }
      }
      packed += Unit::words * panel_rows;
      x += Unit::columns * rows;
    }
    for (int c = 0; c < across; ++c) {
      const int64_t at = ((panel + c / vectors) * groups + g) * panel_rows + c % vectors * F32::width;
      const F32 s = load_scale(a, at), z = F32::load(a.zero_point + at);
      for (int r = 0; r < rows; ++r) {
        const F32 centred = fnma(z, F32::set(a.group_sum[r * groups + g]), sum[r][c]);
        total[r][c] = fma(s, centred, total[r][c]);
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    float sums[panels * panel_rows];
    for (int c = 0; c < across; ++c) total[r][c].store(sums + c * F32::width);
    for (int p = 0; p < panels; ++p) write_row(a, r, panel + p, sums + p * panel_rows);
  }
}

template <int bits, int rows>
static void direct_strip(const W4A16Linear& a, int64_t first, int64_t last) {
  // Panels side by side share each broadcast of x and hide the latency of the chains; how many is
  // bounded by the registers. A panel's result does not depend on its company.
  constexpr int together = FEWBIT_ISA_LEVEL == 2 ? (rows <= 2 ? 4 : 2) : (rows == 1 ? 2 : 1);
  int64_t p = first;
  for (; p + together <= last; p += together) direct<bits, rows, together>(a, p);
  for (; p < last; ++p) direct<bits, rows, 1>(a, p);
}

template <int bits>
static void direct_rows_strip(const W4A16Linear& a, int64_t first, int64_t last) {
  switch (a.m) {
    case 1: direct_strip<bits, 1>(a, first, last); break;
    case 2: direct_strip<bits, 2>(a, first, last); break;
    case 3: direct_strip<bits, 3>(a, first, last); break;
    case 4: direct_strip<bits, 4>(a, first, last); break;
  }
}

// ---- more rows: weights decoded to cache-resident scratch --------------------------------------

constexpr int64_t tile_columns = 256;
constexpr int64_t tile_panels = 8;
#if FEWBIT_ISA_LEVEL == 2
constexpr int micro_panels = 2, micro_rows = 12;
#elif FEWBIT_ISA_LEVEL == 1
constexpr int micro_panels = 1, micro_rows = 6;
#else
constexpr int micro_panels = 1, micro_rows = 1;
#endif

// Decodes columns [k0, k1) of one panel to w[column][16] = (q - z) s.
template <int bits>
static void decode(const W4A16Linear& a, int64_t panel, int64_t k0, int64_t k1, float* w) {
  using Unit = UnitRows<bits>;
  const PackedLayout& l = a.layout;
  const int64_t groups = l.groups();
  for (int64_t u = k0 / Unit::columns; u < k1 / Unit::columns;) {
    const int64_t g = u / l.group_units() < groups ? u / l.group_units() : groups - 1;
    const int64_t group_end = g + 1 < groups ? (g + 1) * l.group_units() : l.units();
    const int64_t stop = group_end < k1 / Unit::columns ? group_end : k1 / Unit::columns;
    const int64_t at = (panel * groups + g) * panel_rows;
    F32 s[vectors], z[vectors];
    for (int v = 0; v < vectors; ++v) {
      s[v] = load_scale(a, at + v * F32::width);
      z[v] = F32::load(a.zero_point + at + v * F32::width);
    }
    for (; u < stop; ++u) {
      const uint32_t* from = a.packed + panel * l.panel_words() + u * Unit::words * panel_rows;
      float* to = w + (u * Unit::columns - k0) * panel_rows;
      for (int v = 0; v < vectors; ++v) {
        const Unit unit = Unit::load(from + v * F32::width);
#pragma GCC unroll 32
        for (int i = 0; i < Unit::columns; ++i)
          ((unit.column(i) - z[v]) * s[v]).store(to + i * panel_rows + v * F32::width);
      }
    }
  }
}

// sums[row][panel p][16] += x[column][row] w[p][column][16]; rows are `stride` apart in x.
template <int rows, int panels>
FEWBIT_INLINE void micro(const float* x, int64_t stride, const float* w, int64_t w_stride,
                         int64_t columns, bool first, float* sums, int64_t sums_panel) {
  constexpr int across = panels * vectors;
  F32 sum[rows][across];
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < across; ++c)
      sum[r][c] = first ? F32::zero()
                        : F32::load(sums + (c / vectors) * sums_panel + r * panel_rows +
                                    c % vectors * F32::width);
  for (int64_t k = 0; k < columns; ++k) {
    F32 right[across];
    for (int c = 0; c < across; ++c)
      right[c] = F32::load(w + (c / vectors) * w_stride + k * panel_rows + c % vectors * F32::width);
    for (int r = 0; r < rows; ++r) {
      const F32 left = F32::set(x[k * stride + r]);
      for (int c = 0; c < across; ++c) sum[r][c] = fma(left, right[c], sum[r][c]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < across; ++c)
      sum[r][c].store(sums + (c / vectors) * sums_panel + r * panel_rows + c % vectors * F32::width);
}

template <int panels>
static void micro_block(int64_t rows, const float* x, int64_t stride, const float* w,
                        int64_t columns, bool first, float* sums, int64_t sums_panel) {
  const int64_t w_stride = tile_columns * panel_rows;
  int64_t r = 0;
  while (r < rows) {
    const float* xr = x + r;
    float* to = sums + r * panel_rows;
    switch (rows - r < micro_rows ? int(rows - r) : micro_rows) {
#define FEWBIT_ROWS(n)                                                                \
  case n:                                                                             \
    micro<(n <= micro_rows ? n : 1), panels>(xr, stride, w, w_stride, columns, first, \
                                             to, sums_panel);                         \
    r += n;                                                                           \
    break;
      FEWBIT_ROWS(1) FEWBIT_ROWS(2) FEWBIT_ROWS(3) FEWBIT_ROWS(4) FEWBIT_ROWS(5) FEWBIT_ROWS(6)
      FEWBIT_ROWS(7) FEWBIT_ROWS(8) FEWBIT_ROWS(9) FEWBIT_ROWS(10) FEWBIT_ROWS(11) FEWBIT_ROWS(12)
#undef FEWBIT_ROWS
    }
  }
}

template <int bits>
static void tiled(const W4A16Linear& a, int64_t first, int64_t last) {
  const PackedLayout& l = a.layout;
  const int64_t padded = l.padded_columns(), sums_panel = a.m * panel_rows;
  const int64_t blocks = ceil_div(a.m, a.block_rows);
  alignas(64) float w[tile_panels * tile_columns * panel_rows];  // 128 KiB: stays in L2
  for (int64_t p0 = first; p0 < last; p0 += tile_panels) {
    const int64_t panels = last - p0 < tile_panels ? last - p0 : tile_panels;
    if (padded == 0) __builtin_memset(a.sums + p0 * sums_panel, 0, size_t(panels * sums_panel) * 4);
    for (int64_t k0 = 0; k0 < padded; k0 += tile_columns) {
      const int64_t k1 = k0 + tile_columns < padded ? k0 + tile_columns : padded;
      for (int64_t p = 0; p < panels; ++p)
        decode<bits>(a, p0 + p, k0, k1, w + p * tile_columns * panel_rows);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t m = block * a.block_rows;
        const int64_t rows = a.m - m < a.block_rows ? a.m - m : a.block_rows;
        const float* x = a.x + (block * padded + k0) * a.block_rows;
        for (int64_t p = 0; p < panels;) {
          float* sums = a.sums + (p0 + p) * sums_panel + m * panel_rows;
          const float* wp = w + p * tile_columns * panel_rows;
          if (p + micro_panels <= panels) {
            micro_block<micro_panels>(rows, x, a.block_rows, wp, k1 - k0, k0 == 0, sums, sums_panel);
            p += micro_panels;
          } else {
            micro_block<1>(rows, x, a.block_rows, wp, k1 - k0, k0 == 0, sums, sums_panel);
            p += 1;
          }
        }
      }
    }
    for (int64_t p = p0; p < p0 + panels; ++p)
      for (int64_t m = 0; m < a.m; ++m)
        write_row(a, m, p, a.sums + p * sums_panel + m * panel_rows);
  }
}

template <int bits>
static void strips(const W4A16Linear& a, int64_t begin, int64_t end) {
  const int64_t first = begin * a.strip;
  const int64_t panels = a.layout.panels();
  const int64_t last = end * a.strip < panels ? end * a.strip : panels;
  if (a.m <= direct_rows) direct_rows_strip<bits>(a, first, last);
  else tiled<bits>(a, first, last);
}

void kernel(const W4A16Linear& a, int64_t begin, int64_t end) {
  switch (a.layout.bits) {
    case 2: strips<2>(a, begin, end); break;
    case 3: strips<3>(a, begin, end); break;
    case 4: strips<4>(a, begin, end); break;
    case 8: strips<8>(a, begin, end); break;
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
