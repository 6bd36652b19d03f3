#include "fewbit/w4a16_linear.h"

#include "panels.h"

namespace fewbit::cpu::FEWBIT_ISA {

// ---- activations -------------------------------------------------------------------------------

// One group of one row to every rows-th float of `out`, zeros up to `padded`; the sum of x.
template <class T>
static float spread(const T* x, int64_t n, int64_t padded, int64_t rows, float* out) {
  float sum[8] = {};  // fixed order, eight chains
  int64_t k = 0;
  for (; k + 8 <= n; k += 8)
    for (int i = 0; i < 8; ++i) {
      const float v = to_float(x[k + i]);
      out[(k + i) * rows] = v;
      sum[i] += v;
    }
  for (; k < n; ++k) sum[k % 8] += out[k * rows] = to_float(x[k]);
  for (; k < padded; ++k) out[k * rows] = 0.0f;
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

template <class T>
static void prepare(const W4A16Prepare& a, int64_t block) {
  const PackedLayout& l = a.layout;
  const int64_t rows = a.block_rows, padded = l.padded_columns();
  const int64_t group_columns = l.group_units() * unit_columns(l.bits);
  float* out = a.prepared + block * padded * rows;
  for (int64_t g = 0; g < l.groups(); ++g) {  // a group of all rows is written while in cache
    const int64_t last = g + 1 < l.groups() ? group_columns : padded - g * group_columns;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t m = block * rows + r;
      const T* x = static_cast<const T*>(a.x) + m * l.columns + group_start(l, g);
      float* to = out + g * group_columns * rows + r;
      const float sum = spread(x, m < a.m ? group_length(l, g) : 0, last, rows, to);
      if (a.group_sum && m < a.m) a.group_sum[m * l.groups() + g] = sum;
    }
  }
}

void kernel(const W4A16Prepare& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto* t) {
    for (int64_t block = begin; block < end; ++block) prepare<element<decltype(t)>>(a, block);
  });
}

// ---- few rows: codes decoded in registers ------------------------------------------------------

// Rows [first_row, +rows) of a block of block_rows rows; `across` vectors of outputs from number
// `vector` on, which belong to panel number / vectors.
template <int bits, int block_rows, int rows, int across>
static void direct(const W4A16Linear& a, int first_row, int64_t vector, int64_t last) {
  using Unit = UnitRows<bits>;
  const PackedLayout& l = a.layout;
  const int64_t groups = l.groups();
  const uint32_t* packed[across];
  int64_t at[across];
  for (int c = 0; c < across; ++c) {  // past the strip's last: the last again, results dropped
    const int64_t here = vector + c < last ? vector + c : last - 1;
    const int64_t lanes = here % vectors * F32::width;
    packed[c] = a.packed + here / vectors * l.panel_words() + lanes;
    at[c] = here / vectors * groups * panel_rows + lanes;
  }
  const float* x = a.x + first_row;  // [padded_columns, block_rows]
  F32 total[rows][across];
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < across; ++c) total[r][c] = F32::zero();
  int64_t word = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t units = g + 1 < groups ? l.group_units() : l.last_units();
    F32 sum[rows][across];
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < across; ++c) sum[r][c] = F32::zero();
    for (int64_t u = 0; u < units; ++u) {
      Unit unit[across];
      for (int c = 0; c < across; ++c) unit[c] = Unit::load(packed[c] + word);
      FEWBIT_UNROLL
      for (int i = 0; i < Unit::columns; ++i) {
        F32 q[across];
        for (int c = 0; c < across; ++c) q[c] = unit[c].column(i);
        FEWBIT_UNROLL
        for (int r = 0; r < rows; ++r) {
          const F32 left = F32::set(x[i * block_rows + r]);
          FEWBIT_UNROLL
          for (int c = 0; c < across; ++c) sum[r][c] = fma(q[c], left, sum[r][c]);
        }
      }
      word += Unit::words * panel_rows;
      x += Unit::columns * block_rows;
    }
    for (int c = 0; c < across; ++c) {
      const int64_t i = at[c] + g * panel_rows;
      const F32 s = load_scale(a.scale, a.scale_dtype, i), z = F32::load(a.zero_point + i);
      for (int r = 0; r < rows; ++r) {
        const int64_t m = first_row + r < a.m ? first_row + r : a.m - 1;
        const F32 x_sum = F32::set(a.group_sum[m * groups + g]);
        total[r][c] = fma(s, fnma(z, x_sum, sum[r][c]), total[r][c]);
      }
    }
  }
  write_tile(a, first_row, vector, last, total);
}

template <int bits, int block_rows>
static void direct_strip(const W4A16Linear& a, int64_t first, int64_t last) {
  // Rows and vectors of one step: they share each broadcast of x and each decoded column and hide
  // the latency of the chains; how many is bounded by the registers. A result does not depend on
  // its company.
  constexpr int most = FEWBIT_ISA_LEVEL >= 2 ? 24 : 12;
  constexpr int rows = block_rows <= most ? block_rows : block_rows / 2;
  constexpr int sums = FEWBIT_ISA_LEVEL < 2 ? 12 : rows < 12 ? 16 : 24;  // 8 x 3 do not fit
  constexpr int across = sums / rows;
  for (int64_t v = first * vectors; v < last * vectors; v += across)
    for (int r = 0; r < block_rows && r < a.m; r += rows)
      direct<bits, block_rows, rows, across>(a, r, v, last * vectors);
}

template <int bits>
static void direct_rows_strip(const W4A16Linear& a, int64_t first, int64_t last) {
  switch (a.block_rows) {
    case 4: direct_strip<bits, 4>(a, first, last); break;
    case 8: direct_strip<bits, 8>(a, first, last); break;
    case 12: direct_strip<bits, 12>(a, first, last); break;
    case 16: direct_strip<bits, 16>(a, first, last); break;
    case 24: direct_strip<bits, 24>(a, first, last); break;
  }
}

// ---- more rows: weights decoded to cache-resident scratch --------------------------------------

// A pair of panels of decoded weights (16 KiB) stays in L1 while a chunk of rows passes; the
// chunk's slice of x and its sums stay in L2 while the strip's panels pass.
constexpr int64_t depth = 128;  // columns
constexpr int64_t chunk_rows = 768;
constexpr int micro_panels = FEWBIT_ISA_LEVEL >= 2 ? 2 : 1;

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
      s[v] = load_scale(a.scale, a.scale_dtype, at + v * F32::width);
      z[v] = F32::load(a.zero_point + at + v * F32::width);
    }
    for (; u < stop; ++u) {
      const uint32_t* from = a.packed + panel * l.panel_words() + u * Unit::words * panel_rows;
      float* to = w + (u * Unit::columns - k0) * panel_rows;
      for (int v = 0; v < vectors; ++v) {
        const Unit unit = Unit::load(from + v * F32::width);
        FEWBIT_UNROLL
        for (int i = 0; i < Unit::columns; ++i)
          ((unit.column(i) - z[v]) * s[v]).store(to + i * panel_rows + v * F32::width);
      }
    }
  }
}

// sums[p][row][16] += x[column][row] w[p][column][16]; rows of x are `stride` apart.
template <int rows>
static void micro(const float* x, int64_t stride, const float* w, int64_t columns, bool first,
                  float* sums, int64_t sums_panel) {
  constexpr int across = micro_panels * vectors;
  constexpr int64_t w_panel = depth * panel_rows;
  F32 sum[rows][across];
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < across; ++c) {
      const int64_t at = (c / vectors) * sums_panel + r * panel_rows + c % vectors * F32::width;
      sum[r][c] = first ? F32::zero() : F32::load(sums + at);
    }
  for (int64_t k = 0; k < columns; ++k) {
    F32 right[across];
    for (int c = 0; c < across; ++c)
      right[c] = F32::load(w + (c / vectors) * w_panel + k * panel_rows + c % vectors * F32::width);
    for (int r = 0; r < rows; ++r) {
      const F32 left = F32::set(x[k * stride + r]);
      for (int c = 0; c < across; ++c) sum[r][c] = fma(left, right[c], sum[r][c]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < across; ++c)
      sum[r][c].store(sums + (c / vectors) * sums_panel + r * panel_rows +
                      c % vectors * F32::width);
}

// One block of rows, in the largest steps that the registers hold.
FEWBIT_INLINE void micro_block(int64_t rows, const float* x, const float* w, int64_t columns,
                               bool first, float* sums, int64_t sums_panel) {
#if FEWBIT_ISA_LEVEL >= 2
  switch (rows) {
    case 8: micro<8>(x, rows, w, columns, first, sums, sums_panel); break;
    case 10: micro<10>(x, rows, w, columns, first, sums, sums_panel); break;
    case 12: micro<12>(x, rows, w, columns, first, sums, sums_panel); break;
    default: micro<14>(x, rows, w, columns, first, sums, sums_panel); break;
  }
#else
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6)
    micro<6>(x + r, rows, w, columns, first, sums + r * panel_rows, sums_panel);
  if (rows - r == 4) micro<4>(x + r, rows, w, columns, first, sums + r * panel_rows, sums_panel);
  if (rows - r == 2) micro<2>(x + r, rows, w, columns, first, sums + r * panel_rows, sums_panel);
#endif
}

template <int bits>
static void tiled(const W4A16Linear& a, int64_t first, int64_t last) {
  const PackedLayout& l = a.layout;
  const int64_t padded = l.padded_columns(), rows = a.block_rows;
  const int64_t blocks = ceil_div(a.m, rows), sums_panel = blocks * rows * panel_rows;
  const int64_t chunk = ceil_div(chunk_rows, rows);
  alignas(64) float w[micro_panels * depth * panel_rows];
  for (int64_t b0 = 0; b0 < blocks; b0 += chunk) {
    const int64_t b1 = b0 + chunk < blocks ? b0 + chunk : blocks;
    for (int64_t k0 = 0; k0 < padded; k0 += depth) {
      const int64_t k1 = k0 + depth < padded ? k0 + depth : padded;
      for (int64_t p = first; p < last; p += micro_panels) {
        // A strip of odd length ends in a pair whose second half is the first again.
        const bool pair = p + micro_panels <= last;
        for (int i = 0; i < micro_panels; ++i)
          decode<bits>(a, pair ? p + i : p, k0, k1, w + i * depth * panel_rows);
        for (int64_t b = b0; b < b1; ++b)
          micro_block(rows, a.x + (b * padded + k0) * rows, w, k1 - k0, k0 == 0,
                      a.sums + p * sums_panel + b * rows * panel_rows, pair ? sums_panel : 0);
      }
    }
  }
  for (int64_t p = first; p < last; ++p) {
    float* sums = a.sums + p * sums_panel;
    if (padded == 0) __builtin_memset(sums, 0, size_t(sums_panel) * 4);
    for (int64_t m = 0; m < a.m; ++m)
      for (int v = 0; v < vectors && p * panel_rows + v * F32::width < l.rows; ++v)
        write(a, m, p * panel_rows + v * F32::width,
              F32::load(sums + m * panel_rows + v * F32::width));
  }
}

template <int bits>
static void strips(const W4A16Linear& a, int64_t first, int64_t last) {
  if (a.m <= direct_rows)
    direct_rows_strip<bits>(a, first, last);
  else
    tiled<bits>(a, first, last);
}

void kernel(const W4A16Linear& a, int64_t begin, int64_t end) {
  // One strip at a time: its sums stay in cache.
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panels = a.layout.panels(), first = task * a.strip;
    const int64_t last = first + a.strip < panels ? first + a.strip : panels;
    switch (a.layout.bits) {
      case 2: strips<2>(a, first, last); break;
      case 3: strips<3>(a, first, last); break;
      case 4: strips<4>(a, first, last); break;
      case 8: strips<8>(a, first, last); break;
    }
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
