#include "fewbit/w8a8_linear.h"

#include "panels.h"

namespace fewbit::cpu::FEWBIT_ISA {

// Bits of one digit, and how many make a float's 24 bits or an int8.
static constexpr int digit_bits(int bits) { return bits == 8 && !wide_dot ? 4 : 8; }
static constexpr int digits_of(int bits, bool codes) { return (codes ? 8 : 24) / digit_bits(bits); }

// ---- activations to digits ---------------------------------------------------------------------

constexpr int64_t piece = 256;  // columns in flight

// v to digits, one per byte: writes words of four columns, `stride` words apart.
FEWBIT_INLINE void put_digits(int32_t* v, int64_t n, int digits, int shift, int64_t stride,
                              uint32_t* out) {
  int8_t bytes[piece] = {};
  const int32_t half = 1 << (shift - 1), base = 1 << shift;
  for (int d = 0; d < digits; ++d) {
    const bool top = d + 1 == digits;
    for (int64_t i = 0; i < n; ++i) {  // the balanced digit; what is left of the top one fits
      const int32_t digit = top ? v[i] : ((v[i] + half) & (base - 1)) - half;
      bytes[i] = int8_t(digit);
      v[i] = (v[i] - digit) >> shift;
    }
    for (int64_t i = 0; i < n; i += 4) __builtin_memcpy(out + i / 4 * stride + d, bytes + i, 4);
  }
}

FEWBIT_INLINE float max_abs(const float* x, int64_t n) {
  float top = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float v = abs_of(x[i]);
    top = v > top ? v : top;
  }
  return top;
}

template <class T>
static void float_row(const Digits& a, int64_t m, int shift, int digits, int64_t stride,
                      uint32_t* out) {
  const PackedLayout& l = a.layout;
  // The top digit of base 256 must stay below 128; base 16 has room (see w8a8_linear.h).
  const float limit = shift == 8 ? 8355711.0f : 8388608.0f;
  for (int64_t g = 0; g < l.groups(); ++g) {
    const T* x = static_cast<const T*>(a.x) + m * l.columns + group_start(l, g);
    const int64_t n = group_length(l, g);
    float top = 0.0f, poison = 0.0f;
    float f[piece];
    for (int64_t k = 0; k < n; k += piece) {
      const int64_t c = n - k < piece ? n - k : piece;
      for (int64_t i = 0; i < c; ++i) {
        f[i] = to_float(x[k + i]);
        poison += f[i] * 0.0f;  // NaN once a value is not finite
      }
      const float t = max_abs(f, c);
      top = t > top ? t : top;
    }
    // sx = 2^(e - 22) for max |x| in [2^e, 2^(e+1)), the exponent kept in a normal float's range.
    int32_t e = int32_t(bits_of(top) >> 23) - 22;
    e = e < 1 ? 1 : e;
    if (top * float_of(uint32_t(254 - e) << 23) > limit) ++e;
    const bool bad = poison != poison;
    const float inverse = bad ? 0.0f : float_of(uint32_t(254 - e) << 23);
    int64_t sum = 0;
    for (int64_t k = 0; k < n; k += piece) {
      const int64_t c = n - k < piece ? n - k : piece;
      int32_t v[piece];
      for (int64_t i = 0; i < c; ++i)
        v[i] = bad ? 0 : int32_t(round_even(to_float(x[k + i]) * inverse));
      int64_t part = 0;
      for (int64_t i = 0; i < c; ++i) part += v[i];
      sum += part;
      put_digits(v, c, digits, shift, stride, out + k / 4 * stride);
    }
    a.scale[m * l.groups() + g] = bad ? __builtin_nanf("") : float_of(uint32_t(e) << 23);
    static_cast<float*>(a.sum)[m * l.groups() + g] = float(sum);
    out += l.group_units() * (unit_columns(l.bits) / 4) * stride;
  }
}

static void code_row(const Digits& a, int64_t m, int shift, int digits, int64_t stride,
                     uint32_t* out) {
  const PackedLayout& l = a.layout;
  for (int64_t g = 0; g < l.groups(); ++g) {
    const int8_t* x = static_cast<const int8_t*>(a.x) + m * l.columns + group_start(l, g);
    const int64_t n = group_length(l, g);
    int32_t sum = 0;
    for (int64_t k = 0; k < n; k += piece) {
      const int64_t c = n - k < piece ? n - k : piece;
      int32_t v[piece];
      for (int64_t i = 0; i < c; ++i) {
        v[i] = x[k + i];
        sum += v[i];
      }
      put_digits(v, c, digits, shift, stride, out + k / 4 * stride);
    }
    static_cast<int32_t*>(a.sum)[m * l.groups() + g] = sum;
    out += l.group_units() * (unit_columns(l.bits) / 4) * stride;
  }
}

void kernel(const Digits& a, int64_t begin, int64_t end) {
  const int bits = a.layout.bits, shift = digit_bits(bits), digits = digits_of(bits, a.codes);
  const int64_t quads = a.layout.padded_columns() / 4, stride = a.block_rows * digits;
  for (int64_t m = begin; m < end; ++m) {
    uint32_t* out = a.out + m / a.block_rows * quads * stride + m % a.block_rows * digits;
    if (m >= a.m || a.layout.padded_columns() != a.layout.columns)
      for (int64_t i = 0; i < quads; ++i)
        for (int d = 0; d < digits; ++d) out[i * stride + d] = 0;
    if (m >= a.m) continue;
    if (a.codes)
      code_row(a, m, shift, digits, stride, out);
    else
      with_type(a.dtype, [&](auto* t) {
        float_row<element<decltype(t)>>(a, m, shift, digits, stride, out);
      });
  }
}

// ---- the product -------------------------------------------------------------------------------

// Scales and zero points are asked for as many groups ahead: 16 KiB of 4-bit codes in groups of
// 128.
constexpr int64_t groups_ahead = 16;

// Rows [first_row, +rows) of a block of block_rows rows. The first tile of a panel and a chunk of
// rows runs the outliers' product for the `outlier_rows` rows from its own on.
template <int bits, bool codes, int block_rows, int rows, int panels>
static void tile(const W8A8Linear& a, int64_t block, int first_row, int64_t panel, int64_t last,
                 int64_t outlier_rows) {
  using Unit = UnitRows<bits>;
  constexpr int across = panels * vectors, digits = digits_of(bits, codes);
  constexpr int quads = Unit::columns / 4;
  constexpr int chunk = dot_steps / quads;  // units between two widenings
  // Sums of 32 bits need none. With few of them it is done all the same: a chain that starts anew
  // need not wait for the last.
  constexpr bool whole_group = wide_dot && rows * across * digits >= 16;
  const PackedLayout& l = a.layout;
  const int64_t groups = l.groups(), m = block * block_rows + first_row;
  const int64_t scale_bytes = a.scale_dtype == DType::f32 ? 4 : 2;
  const uint32_t* x = a.x + (block * (l.padded_columns() / 4) * block_rows + first_row) * digits;

  // A panel past the strip's last is the last again: its results are dropped.
  const uint32_t* packed[panels];
  int64_t at[panels];
  for (int p = 0; p < panels; ++p) {
    const int64_t here = panel + p < last ? panel + p : last - 1;
    packed[p] = a.packed + here * l.panel_words();
    at[p] = here * groups * panel_rows;
  }

  F32 total[rows][across];
  int64_t token[rows];  // past the last: the last again
  for (int r = 0; r < rows; ++r) {
    token[r] = m + r < a.m ? m + r : a.m - 1;
    for (int c = 0; c < across; ++c) total[r][c] = F32::zero();
  }

  const int64_t group_units = l.group_units(), last_units = l.last_units();
  int64_t word = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t units = g + 1 < groups ? group_units : last_units;
    I32 sum[rows][across][digits];
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < across; ++c)
        for (int d = 0; d < digits; ++d) sum[r][c][d] = I32::zero();
    const auto add = [&](int64_t n) {  // n units to sum
      Dot part[rows][across][digits];
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < across; ++c)
          for (int d = 0; d < digits; ++d) part[r][c][d] = Dot::zero();
      for (int64_t u = 0; u < n; ++u) {
        Unit unit[across];
        for (int c = 0; c < across; ++c) {
          const uint32_t* from = packed[c / vectors] + word + c % vectors * F32::width;
          unit[c] = Unit::load(from);
          if (c % vectors == 0) ask_ahead(from);
        }
        // All three unrolled, or the compiler keeps the sums in memory.
        FEWBIT_UNROLL
        for (int j = 0; j < quads; ++j) {
          U32 q[across];
          for (int c = 0; c < across; ++c) q[c] = unit[c].quad(j);
          FEWBIT_UNROLL
          for (int r = 0; r < rows * digits; ++r) {
            const U32 left = U32::set(x[r]);
            FEWBIT_UNROLL
            for (int c = 0; c < across; ++c) {
              Dot& to = part[r / digits][c][r % digits];
              to = dot(to, q[c], left);
            }
          }
          x += block_rows * digits;
        }
        word += Unit::words * panel_rows;
      }
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < across; ++c)
          for (int d = 0; d < digits; ++d) sum[r][c][d] = sum[r][c][d] + widen(part[r][c][d]);
    };
    if constexpr (whole_group)
      add(units);
    else
      for (int64_t first = 0; first < units; first += chunk)
        add(units - first < chunk ? units - first : chunk);
    for (int c = 0; c < across; ++c) {
      const int64_t i = at[c / vectors] + g * panel_rows + c % vectors * F32::width;
      const F32 s = load_scale(a.scale, a.scale_dtype, i);
      if (c % vectors == 0) {
        const int64_t ahead = i + groups_ahead * panel_rows;
        __builtin_prefetch(static_cast<const char*>(a.scale) + ahead * scale_bytes);
        __builtin_prefetch(a.zero_point + ahead);
      }
      for (int r = 0; r < rows; ++r) {
        const int64_t mg = token[r] * groups + g;
        if constexpr (codes) {
          I32 d = sum[r][c][0];
          if constexpr (digits == 2) d = d + (sum[r][c][1] << digit_bits(bits));
          d = d - I32::load(a.zero_point + i) * I32::set(static_cast<const int32_t*>(a.x_sum)[mg]);
          if (a.x_zero) d = d - I32::load(a.code_sum + i) * I32::set(a.x_zero[token[r]]);
          total[r][c] = fma(s, to_float(d), total[r][c]);
        } else {
          F32 v = to_float(sum[r][c][digits - 1]);
          for (int d = digits - 2; d >= 0; --d)
            v = fma(v, F32::set(float(1 << digit_bits(bits))), to_float(sum[r][c][d]));
          const F32 x_sum = F32::set(static_cast<const float*>(a.x_sum)[mg]);
          v = fnma(F32::load(a.zero_point + i), x_sum, v);
          total[r][c] = fma(s, v * F32::set(a.x_scale[mg]), total[r][c]);
        }
      }
    }
  }
  if constexpr (codes)
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < across; ++c) total[r][c] = total[r][c] * F32::set(a.x_scale[token[r]]);
  if (a.outliers) {
    OutlierProduct o = *a.outliers;
    if (outlier_rows > 0) {
      o.begin = m;
      o.end = m + outlier_rows < a.m ? m + outlier_rows : a.m;
      a.outlier_product(o, panel, panel + panels < last ? panel + panels : last);
    }
    for (int r = 0; r < rows && m + r < a.m; ++r)
      for (int c = 0; c < across && panel + c / vectors < last; ++c)
        total[r][c] = total[r][c] + F32::load(o.out + o.at(m + r, panel + c / vectors) +
                                              c % vectors * F32::width);
  }
  write_tile(a, m, panel * vectors, last * vectors, total);
}

// Rows and panels of one step: enough chains to hide latency, few enough to stay in registers (sums
// of 16 bits need others beside them). A row's and a panel's result does not depend on its company.
constexpr int most_chains = FEWBIT_ISA_LEVEL >= 2 ? 16 : 8;
constexpr int most_sums = FEWBIT_ISA_LEVEL == 3 ? 16 : FEWBIT_ISA_LEVEL == 2 ? 12 : 6;
static constexpr int step_rows(int block_rows, int digits) {
  int rows = block_rows;
  while (rows > 1 && rows * digits * vectors > most_chains) rows /= 2;
  return rows;
}
static constexpr int step_panels(int rows, int digits) {
  if (rows <= fixed_rows) return 1;  // bound by memory, which gives one stream more than several
  const int panels = most_sums / (rows * digits * vectors);
  return panels < 1 ? 1 : panels > 4 ? 4 : panels;
}

template <int bits, bool codes, int block_rows>
static void blocks(const W8A8Linear& a, int64_t first, int64_t last) {
  constexpr int digits = digits_of(bits, codes), rows = step_rows(block_rows, digits);
  constexpr int panels = step_panels(rows, digits);
  // Rows in chunks whose digits stay in the second-level cache while the panels pass.
  const int64_t block_bytes = a.layout.padded_columns() * digits * block_rows;
  const int64_t all = ceil_div(a.m, block_rows), fit = (1 << 19) / (block_bytes + 1) + 1;
  for (int64_t b0 = 0; b0 < all; b0 += fit)
    for (int64_t p = first; p < last; p += panels)
      for (int64_t b = b0; b < all && b < b0 + fit; ++b)
        for (int r = 0; r < block_rows && b * block_rows + r < a.m; r += rows)
          tile<bits, codes, block_rows, rows, panels>(a, b, r, p, last,
                                                      b == b0 && r == 0 ? fit * block_rows : 0);
}

template <int bits>
static void strips(const W8A8Linear& a, int64_t first, int64_t last) {
  if (a.codes) {
    switch (a.block_rows) {
      case 1: blocks<bits, true, 1>(a, first, last); break;
      case 2: blocks<bits, true, 2>(a, first, last); break;
      case 4: blocks<bits, true, 4>(a, first, last); break;
      default: blocks<bits, true, integer_block_rows>(a, first, last); break;
    }
  } else {
    if (a.block_rows == 1)
      blocks<bits, false, 1>(a, first, last);
    else
      blocks<bits, false, 2>(a, first, last);
  }
}

void kernel(const W8A8Linear& a, int64_t begin, int64_t end) {
  const int64_t panels = a.layout.panels(), first = begin * a.strip;
  const int64_t last = end * a.strip < panels ? end * a.strip : panels;
  switch (a.layout.bits) {
    case 2: strips<2>(a, first, last); break;
    case 3: strips<3>(a, first, last); break;
    case 4: strips<4>(a, first, last); break;
    case 8: strips<8>(a, first, last); break;
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
