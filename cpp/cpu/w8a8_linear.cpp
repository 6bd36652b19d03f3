#include "fewbit/w8a8_linear.h"

#include "panels.h"
#include "tiles.h"

namespace fewbit::cpu::FEWBIT_ISA {

// Bits of one digit, and how many make a float's 24 bits or an int8.
static constexpr int digit_bits(int bits) { return bits == 8 && !wide_dot ? 4 : 8; }
static constexpr int digits_of(int bits, bool codes) { return (codes ? 8 : 24) / digit_bits(bits); }

// ---- activations to digits ---------------------------------------------------------------------

// Where the digits of one row go: `quantum` columns of a digit lie together, `digit` bytes before
// those of the next digit and `step` bytes before the next columns of the same.
template <int quantum>
struct Places {
  uint8_t* out;  // of the group's first columns
  int64_t digit, step;

  FEWBIT_INLINE_MEMBER uint8_t* at(int64_t column, int d) const {
    return out + column / quantum * step + d * digit;
  }
  FEWBIT_INLINE_MEMBER void next_group(const PackedLayout& l) {
    out += ceil_div(l.group_units() * unit_columns(l.bits), quantum) * step;
  }
};

// Columns in flight: as many as a lane can add up, 2^8 of 2^23.
constexpr int64_t piece = F32::width == 1 ? 64 : 256;
// As far as the digits of n columns are written: whole tiles, or at least whole vectors.
FEWBIT_INLINE int64_t filled(int64_t n) { return ceil_div(n, tile_columns) * tile_columns; }

// Columns [k, k + n) of a group, 0 from n to filled(n), to digits; their sum.
template <int quantum>
FEWBIT_INLINE int64_t put_digits(const int32_t* v, int64_t k, int64_t n, int digits, int shift,
                                 const Places<quantum>& to) {
  alignas(line) int8_t bytes[max_digits][piece];
  I32 sum = I32::zero();
  for (int64_t i = 0; i < filled(n); i += F32::width) {
    I32 rest = I32::load(v + i);
    sum = sum + rest;
    // The balanced digit is the low bits with their sign; what is left of the top one fits.
    for (int d = 0; d + 1 < digits; ++d) {
      const I32 digit = (rest << (32 - shift)) >> (32 - shift);
      digit.store_low_byte(bytes[d] + i);
      rest = (rest - digit) >> shift;
    }
    rest.store_low_byte(bytes[digits - 1] + i);
  }
  for (int d = 0; d < digits; ++d)
    for (int64_t i = 0; i < n; i += quantum)
      __builtin_memcpy(to.at(k + i, d), bytes[d] + i, quantum);
  int32_t lanes[F32::width];
  sum.store(lanes);
  int64_t all = 0;
  for (int l = 0; l < F32::width; ++l) all += lanes[l];
  return all;
}

// n <= piece elements of x as float32, zeros up to filled(n).
template <class T>
FEWBIT_INLINE void load_piece(const T* x, int64_t n, float* f) {
  int64_t i = 0;
  for (; i + F32::width <= n; i += F32::width) F32::load(x + i).store(f + i);
  for (; i < filled(n); ++i) f[i] = i < n ? to_float(x[i]) : 0.0f;
}

template <class T, int quantum>
static void float_row(const Digits& a, int64_t m, int shift, int digits, Places<quantum> to) {
  const PackedLayout& l = a.layout;
  // The top digit of base 256 must stay below 128; base 16 has room (see w8a8_linear.h).
  const float limit = shift == 8 ? 8355711.0f : 8388608.0f;
  alignas(line) float f[piece];
  alignas(line) int32_t v[piece];
  for (int64_t g = 0; g < l.groups(); ++g) {
    const T* x = static_cast<const T*>(a.x) + m * l.columns + group_start(l, g);
    const int64_t n = group_length(l, g);
    F32 largest = F32::zero(), poison = F32::zero();  // NaN once a value is not finite
    for (int64_t k = 0; k < n; k += piece) {
      const int64_t c = n - k < piece ? n - k : piece;
      load_piece(x + k, c, f);
      for (int64_t i = 0; i < c; i += F32::width) {
        const F32 some = F32::load(f + i);
        largest = max(abs(some), largest);
        poison = fma(some, F32::zero(), poison);
      }
    }
    const float top = reduce_max(largest);
    float bad = 0.0f;
    for (int i = 0; i < F32::width; ++i) bad += lane(poison, i);
    const bool finite = bad == 0.0f;
    // sx = 2^(e - 22) for max |x| in [2^e, 2^(e+1)), the exponent kept in a normal float's range.
    int32_t e = int32_t(bits_of(top) >> 23) - 22;
    e = e < 1 ? 1 : e;
    if (top * float_of(uint32_t(254 - e) << 23) > limit) ++e;
    const F32 inverse = F32::set(float_of(uint32_t(254 - e) << 23));
    int64_t sum = 0;
    for (int64_t k = 0; k < n; k += piece) {
      const int64_t c = n - k < piece ? n - k : piece;
      if (n > piece) load_piece(x + k, c, f);
      for (int64_t i = 0; i < filled(c); i += F32::width)
        (finite ? to_int(F32::load(f + i) * inverse) : I32::zero()).store(v + i);
      sum += put_digits(v, k, c, digits, shift, to);
    }
    a.scale[m * l.groups() + g] = finite ? float_of(uint32_t(e) << 23) : __builtin_nanf("");
    static_cast<float*>(a.sum)[m * l.groups() + g] = float(sum);
    to.next_group(l);
  }
}

template <int quantum>
static void code_row(const Digits& a, int64_t m, int shift, int digits, Places<quantum> to) {
  const PackedLayout& l = a.layout;
  for (int64_t g = 0; g < l.groups(); ++g) {
    const int8_t* x = static_cast<const int8_t*>(a.x) + m * l.columns + group_start(l, g);
    const int64_t n = group_length(l, g);
    int32_t sum = 0;
    int64_t k = 0;
    if (digits == 1) {  // codes are their own digits
      for (; k + quantum <= n; k += quantum) __builtin_memcpy(to.at(k, 0), x + k, quantum);
      for (int64_t i = 0; i < k; ++i) sum += x[i];
    }
    for (; k < n; k += piece) {
      const int64_t c = n - k < piece ? n - k : piece;
      int32_t v[piece];
      for (int64_t i = 0; i < filled(c); ++i) v[i] = i < c ? x[k + i] : 0;
      sum += int32_t(put_digits(v, k, c, digits, shift, to));
    }
    static_cast<int32_t*>(a.sum)[m * l.groups() + g] = sum;
    to.next_group(l);
  }
}

template <int quantum>
static void digit_row(const Digits& a, int64_t m, int shift, int digits, int64_t columns,
                      const Places<quantum>& to) {
  if (m >= a.m || columns != a.layout.columns)
    for (int64_t k = 0; k < columns; k += quantum)
      for (int d = 0; d < digits; ++d) __builtin_memset(to.at(k, d), 0, quantum);
  if (m >= a.m) return;
  if (a.codes)
    code_row(a, m, shift, digits, to);
  else
    with_type(a.dtype, [&](auto* t) { float_row<element<decltype(t)>>(a, m, shift, digits, to); });
}

void kernel(const Digits& a, int64_t begin, int64_t end) {
  const int bits = a.layout.bits, shift = digit_bits(bits), digits = digits_of(bits, a.codes);
  const int64_t rows = a.block_rows;
  uint8_t* out = reinterpret_cast<uint8_t*>(a.out);
  for (int64_t m = begin; m < end; ++m) {
    if (in_tiles(rows)) {
      const int64_t tiles = a.layout.tiles(), step = rows / tile_rows * digits * tile_bytes;
      const int64_t at = m / rows * tiles * step + m % rows / tile_rows * tile_bytes;
      const Places<tile_columns> to{out + at + m % tile_rows * tile_columns, tile_bytes, step};
      digit_row(a, m, shift, digits, tiles * tile_columns, to);
    } else {
      const int64_t columns = a.layout.padded_columns(), step = rows * digits * 4;
      const Places<4> to{out + m / rows * (columns / 4) * step + m % rows * digits * 4, 4, step};
      digit_row(a, m, shift, digits, columns, to);
    }
  }
}

// ---- the product -------------------------------------------------------------------------------

// Scales and zero points are asked for as many groups ahead: 16 KiB of 4-bit codes in groups of
// 128.
constexpr int64_t groups_ahead = 16;
constexpr int64_t words_ahead = 8192;  // of weights: 32 KiB, which the second cache has room for

// Rows [first_row, +rows) of a block of block_rows rows. The first tile of a panel and a chunk of
// rows runs the outliers' product for the `outlier_rows` rows from its own on.
template <int bits, bool codes, int block_rows, int rows, int panels>
static void tile(const W8A8Linear& a, int64_t block, int first_row, int64_t panel,
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

  const uint32_t* packed[panels];
  int64_t at[panels];
  for (int p = 0; p < panels; ++p) {
    packed[p] = a.packed + (panel + p) * l.panel_words();
    at[p] = (panel + p) * groups * panel_rows;
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
          if (c % vectors == 0) ask_later(from + words_ahead);
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
      a.outlier_product(o, panel, panel + panels);
    }
    for (int r = 0; r < rows && m + r < a.m; ++r)
      for (int c = 0; c < across; ++c)
        total[r][c] = total[r][c] + F32::load(o.out + o.at(m + r, panel + c / vectors) +
                                              c % vectors * F32::width);
  }
  write_tile(a, m, panel * vectors, (panel + panels) * vectors, total);
}

// Rows and panels of one step: enough chains to hide latency, few enough to stay in registers (sums
// of 16 bits need others beside them). A row's and a panel's result does not depend on its company.
constexpr int most_chains = FEWBIT_ISA_LEVEL >= 2 ? 16 : 8;
constexpr int most_sums = FEWBIT_ISA_LEVEL >= 3 ? 16 : FEWBIT_ISA_LEVEL == 2 ? 12 : 6;
static constexpr int step_rows(int block_rows, int digits) {
  int rows = block_rows;
  while (rows > 1 && rows * digits * vectors > most_chains) rows /= 2;
  return rows;
}
static constexpr int step_panels(int bits, int rows, int digits) {
  // A row or two is bound by memory. It gives one stream of codes more than several, but where they
  // are used as they come, one byte each: that outruns what is asked for ahead.
  if (rows <= fixed_rows && (bits != 8 || digits > 1)) return 1;
  const int panels = most_sums / (rows * digits * vectors);
  return panels < 1 ? 1 : panels > 4 ? 4 : panels;
}

template <int bits, bool codes, int block_rows>
static void blocks(const W8A8Linear& a, int64_t first, int64_t last) {
  constexpr int digits = digits_of(bits, codes), rows = step_rows(block_rows, digits);
  constexpr int panels = step_panels(bits, rows, digits);
  // Rows in chunks whose digits stay in the second-level cache while the panels pass.
  const int64_t block_bytes = a.layout.padded_columns() * digits * block_rows;
  const int64_t all = ceil_div(a.m, block_rows), fit = (1 << 19) / (block_bytes + 1) + 1;
  for (int64_t b0 = 0; b0 < all; b0 += fit)
    in_counts<panels>(first, last, [&](auto count, int64_t p) {
      for (int64_t b = b0; b < all && b < b0 + fit; ++b)
        for (int r = 0; r < block_rows && b * block_rows + r < a.m; r += rows)
          tile<bits, codes, block_rows, rows, count.value>(
              a, b, r, p, b == b0 && r == 0 ? fit * block_rows : 0);
    });
}

// ---- the product of tiles ----------------------------------------------------------------------

#if FEWBIT_HAS_TILES

// Codes less zero points as the right tiles of a panel: signed bytes, but 8-bit codes as they are,
// whose zero point is subtracted from the sums.
template <int bits>
static void decode(const W8A8Linear& a, int64_t panel, uint8_t* out) {
  using Unit = UnitRows<bits>;
  constexpr int quads = Unit::columns / 4;
  const PackedLayout& l = a.layout;
  const uint32_t* packed = a.packed + panel * l.panel_words();
  for (int64_t g = 0; g < l.groups(); ++g) {
    const int64_t units = g + 1 < l.groups() ? l.group_units() : l.last_units();
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = (panel * l.groups() + g) * panel_rows + v * F32::width;
      const U32 z = spread_bytes(a.zero_point + at);
      uint8_t* to = out + v * F32::width * 4;
      for (int64_t u = 0; u < units; ++u) {
        const Unit unit = Unit::load(packed + u * Unit::words * panel_rows + v * F32::width);
        FEWBIT_UNROLL
        for (int j = 0; j < quads; ++j, to += tile_columns) {
          const U32 q = unit.quad(j);
          (bits == 8 ? q : subtract_bytes(q, z)).store(reinterpret_cast<uint32_t*>(to));
        }
      }
    }
    // Columns past the group's meet digits that are 0.
    const int64_t bytes = units * quads * tile_columns;
    const int64_t whole = ceil_div(bytes, tile_bytes) * tile_bytes;
    __builtin_memset(out + bytes, 0, size_t(whole - bytes));
    packed += units * Unit::words * panel_rows;
    out += whole;
  }
}

// The left tiles of one step by the right tiles of two panels. Left tiles: `lefts` of them side by
// side, three digits of 16 rows or up to three times 16 rows of codes.
template <int bits, bool codes, int lefts>
class TileStep {
 public:
  TileStep(const W8A8Linear& a, int64_t first_row, int64_t panel, int64_t last)
      : a_(a), m_(first_row), panel_(panel), last_(last) {}

  // right[p]: the tiles of panel p of the two.
  void run(Tiles& t, const uint8_t* left, const uint8_t* const (&right)[2]) {
    for (auto& total : total_) __builtin_memset(total, 0, sizeof total);
    const PackedLayout& l = a_.layout;
    int64_t k = 0;
    for (int64_t g = 0; g < l.groups(); ++g) {
      const int64_t stop = g + 1 < l.groups() ? k + l.group_tiles() : l.tiles();
      // A few columns at a time, so that the second panel finds the left tiles in cache. A panel's
      // sums are read when the other's products are under way.
      for (bool first = true; k < stop; first = false) {
        const int64_t n = stop - k < depth ? stop - k : depth;
        const bool done = k + n == stop;
        add<0>(t, first, left + k * lefts * tile_bytes, right[0] + k * tile_bytes, n);
        if (first && g > 0) finish<1>(t, g - 1);
        add<1>(t, first, left + k * lefts * tile_bytes, right[1] + k * tile_bytes, n);
        if (done) finish<0>(t, g);
        k += n;
      }
    }
    if (l.groups() > 0) finish<1>(t, l.groups() - 1);
  }

  // Row r of the step, vector v of panel p.
  F32 total(int p, int64_t r, int v) const {
    return F32::load(total_[p] + r * panel_rows + v * F32::width);
  }

  static constexpr int64_t rows = codes ? lefts * tile_rows : tile_rows;

 private:
  static constexpr int64_t depth = 4;  // tiles

  template <int p>
  FEWBIT_INLINE_MEMBER void add(Tiles& t, bool first, const uint8_t* left, const uint8_t* right,
                                int64_t n) {
    constexpr int sum = p * lefts;
    if (first) {
      t.zero<sum>();
      if constexpr (lefts > 1) t.zero<sum + 1>();
      if constexpr (lefts > 2) t.zero<sum + 2>();
    }
    for (int64_t i = 0; i < n; ++i, left += lefts * tile_bytes) {
      t.load<Tiles::right>(right + i * tile_bytes);
      t.load<Tiles::left>(left);
      t.dot<sum, bits != 8>();
      if constexpr (lefts > 1) {
        t.load<Tiles::left>(left + tile_bytes);
        t.dot<sum + 1, bits != 8>();
      }
      if constexpr (lefts > 2) {
        t.load<Tiles::left>(left + 2 * tile_bytes);
        t.dot<sum + 2, bits != 8>();
      }
    }
  }

  // Adds the sums of group g.
  template <int p>
  FEWBIT_INLINE_MEMBER void finish(Tiles& t, int64_t g) {
    constexpr int first = p * lefts;
    alignas(line) int32_t sums[lefts][tile_rows][panel_rows];
    t.store<first>(sums[0][0]);
    if constexpr (lefts > 1) t.store<first + 1>(sums[1][0]);
    if constexpr (lefts > 2) t.store<first + 2>(sums[2][0]);
    const int64_t groups = a_.layout.groups();
    const int64_t here = panel_ + p < last_ ? panel_ + p : last_ - 1;
    const int64_t count = a_.m - m_ < rows ? a_.m - m_ : rows;
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = (here * groups + g) * panel_rows + v * F32::width;
      const F32 s = load_scale(a_.scale, a_.scale_dtype, at);
      const auto sum = [&](int64_t left, int64_t r) {
        return I32::load(&sums[left][r][v * F32::width]);
      };
      for (int64_t r = 0; r < count; ++r) {
        const int64_t mg = (m_ + r) * groups + g;
        float* out = total_[p] + r * panel_rows + v * F32::width;
        const F32 total = F32::load(out);
        if constexpr (codes) {
          I32 d = sum(r / tile_rows, r % tile_rows);
          if constexpr (bits == 8)
            d = d -
                I32::load(a_.zero_point + at) * I32::set(static_cast<const int32_t*>(a_.x_sum)[mg]);
          if (a_.x_zero) d = d - I32::load(a_.code_sum + at) * I32::set(a_.x_zero[m_ + r]);
          fma(s, to_float(d), total).store(out);
        } else {
          F32 d = to_float(sum(2, r));
          d = fma(d, F32::set(256.0f), to_float(sum(1, r)));
          d = fma(d, F32::set(256.0f), to_float(sum(0, r)));
          if constexpr (bits == 8)
            d = fnma(F32::load(a_.zero_point + at),
                     F32::set(static_cast<const float*>(a_.x_sum)[mg]), d);
          fma(s, d * F32::set(a_.x_scale[mg]), total).store(out);
        }
      }
    }
  }

  const W8A8Linear& a_;
  int64_t m_, panel_, last_;
  alignas(line) float total_[2][rows * panel_rows];
};

template <int bits, bool codes, int lefts>
static void tile_steps(const W8A8Linear& a, int64_t task, int64_t first, int64_t last) {
  using Step = TileStep<bits, codes, lefts>;
  const PackedLayout& l = a.layout;
  const int64_t tiles = l.tiles(), step_bytes = lefts * tiles * tile_bytes;
  const int64_t steps = ceil_div(a.m, Step::rows), fit = (1 << 20) / (step_bytes + 1) + 1;
  const uint8_t* x = reinterpret_cast<const uint8_t*>(a.x);
  uint8_t* decoded = a.decoded + task * 2 * tiles * tile_bytes;
  Tiles t(a.m < tile_rows ? a.m : tile_rows);
  // Rows in chunks whose tiles stay in the second-level cache while the panels pass.
  for (int64_t s0 = 0; s0 < steps; s0 += fit)
    for (int64_t p = first; p < last; p += 2) {
      const uint8_t* right[2];
      for (int i = 0; i < 2; ++i) {  // past the last: the last again, its results dropped
        const int64_t here = p + i < last ? p + i : last - 1;
        if (a.decoded) {
          right[i] = decoded + i * tiles * tile_bytes;
          if (here == p + i || i == 0)
            decode<bits>(a, here, decoded + i * tiles * tile_bytes);
          else
            right[i] = right[0];
        } else {  // 8-bit codes already lie as tiles
          right[i] = reinterpret_cast<const uint8_t*>(a.packed + here * l.panel_words());
        }
      }
      for (int64_t s = s0; s < steps && s < s0 + fit; ++s) {
        const int64_t m = s * Step::rows;
        Step step(a, m, p, last);
        step.run(t, x + s * step_bytes, right);
        const int64_t end = m + Step::rows < a.m ? m + Step::rows : a.m;
        OutlierProduct o{};
        alignas(line) float outlier_sums[2 * Step::rows * panel_rows];
        if (a.outliers) {  // of this step alone: to memory and back would cost more than the
                           // product
          o = *a.outliers;
          o.out = outlier_sums;
          o.first_row = o.begin = m;
          o.first_panel = p;
          o.rows = Step::rows;
          o.end = end;
          a.outlier_product(o, p, p + 2 < last ? p + 2 : last);
        }
        for (int64_t r = m; r < end; ++r)
          for (int i = 0; i < 2 && p + i < last; ++i)
            for (int v = 0; v < vectors; ++v) {
              F32 total = step.total(i, r - m, v);
              if constexpr (codes) total = total * F32::set(a.x_scale[r]);
              if (a.outliers)
                total = total + F32::load(outlier_sums + o.at(r, p + i) + v * F32::width);
              write(a, r, (p + i) * panel_rows + v * F32::width, total);
            }
      }
    }
}

template <int bits>
static void tile_strips(const W8A8Linear& a, int64_t task, int64_t first, int64_t last) {
  if (!a.codes) return tile_steps<bits, false, tile_lefts>(a, task, first, last);
  switch (a.block_rows / tile_rows) {
    case 1: tile_steps<bits, true, 1>(a, task, first, last); break;
    case 2: tile_steps<bits, true, 2>(a, task, first, last); break;
    default: tile_steps<bits, true, tile_lefts>(a, task, first, last); break;
  }
}

#endif

template <int bits>
static void strips(const W8A8Linear& a, int64_t task, int64_t first, int64_t last) {
#if FEWBIT_HAS_TILES
  if (in_tiles(a.block_rows)) return tile_strips<bits>(a, task, first, last);
#else
  (void)task;  // only tiles have scratch
#endif
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
    case 2: strips<2>(a, begin, first, last); break;
    case 3: strips<3>(a, begin, first, last); break;
    case 4: strips<4>(a, begin, first, last); break;
    case 8: strips<8>(a, begin, first, last); break;
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
