// The inner loop of the packed matrix products on tensor cores.
//
// The packed layout (fewbit/layout.h) is read as it is. The order of k inside a product is free as
// long as both operands agree, and so is the order of n: lane 4 g + t loads 16 bytes, which are
// rows 4 (g % 4) .. + 3 of panel g / 4 of its warp's two, in unit t of a step. So
//
//   n of position n' of the i-th 8-wide tile is 4 n' + i    (packed_row)
//   k of slot j of lane t is lane_columns t + j              (natural order inside the lane)
//
// and each lane ends with eight neighbouring columns of its rows of the result: 8 t .. 8 t + 7.
// x of 4-bit codes comes in words of the same order, so both operands are multiplied as they lie.
//
// Work is shared by stream-K (M. Osama et al., PPoPP 2023): a tile of the result has `depth` pieces
// along k; the pieces of all tiles, one after the other, are cut into even runs, one per block. A
// block that has a tile to itself writes the result. Tiles that blocks share go to `partial`, and a
// second kernel adds their parts in the order of k: the same bits in every run, no atomics, and no
// block waits for another.
#pragma once
#include "mma.h"
#include "units.h"

namespace fewbit::cuda {

constexpr int product_warps = 4;
constexpr int product_threads = product_warps * warp_size;
constexpr int warp_rows = 2 * int(panel_rows);  // of the weight
constexpr int product_columns = product_warps * warp_rows;

// Row of the warp's 32 at position `column` of tile i.
FEWBIT_ALWAYS_INLINE int packed_row(int column, int i) { return 4 * column + i; }

template <class X, int bits, int tiles_, int level>
struct Shape {
  static constexpr bool fours = std::is_same_v<X, Int4>;
  static constexpr bool integer = fours || std::is_same_v<X, int8_t>;
  static constexpr int tiles = tiles_;  // of 16 rows of x
  static constexpr int rows = 16 * tiles;
  static constexpr int x_bits = bits_in<X>;
  static constexpr int lane_columns = fours ? 16 : bits == 8 ? 8 : int(unit_columns(bits));
  static constexpr int lane_words = lane_columns * bits / 32;
  static constexpr int chunk = fours ? 16 : 8;   // columns that meet one product or two of halves
  static constexpr int step = 4 * lane_columns;  // columns that a warp takes at once
  // Columns per stage: as many as registers and shared memory have room for.
  static constexpr bool long_slabs = tiles == 1 && bits == 4 && !fours;
  static constexpr int slab = fours || long_slabs || step > 64 ? 128 : 64;
  static constexpr int steps = slab / step;
  static constexpr int stages = level < 80 ? 2 : tiles > 1 || long_slabs ? 3 : 4;
  static constexpr int row_bytes = slab * x_bits / 8, step_bytes = step * x_bits / 8;
  // Rows of x in shared memory, apart so that the lanes of one access hit different banks.
  static constexpr int pitch =
      row_bytes + (step_bytes >= 128 ? 16 : (step_bytes - row_bytes % 128 + 128) % 128);
  static constexpr int x_pieces = rows * row_bytes / 16;  // of 16 bytes
  static constexpr int x_loads = (x_pieces + product_threads - 1) / product_threads;
  static constexpr int w_loads = steps * lane_words;
  static constexpr int x_bytes = rows * pitch;
  static constexpr int w_bytes = level < 80 ? 0 : w_loads * product_threads * 16;
  static constexpr int shared_bytes = stages * (x_bytes + w_bytes);
};

// How stream-K cuts a product.
struct Work {
  int64_t m_tiles, tiles;  // tile = n_tile * m_tiles + m_tile
  int64_t depth;           // pieces of a tile along k
  int rows, columns;       // of the result, in a tile
  int64_t blocks;

  FEWBIT_ALWAYS_INLINE int64_t pieces() const { return tiles * depth; }
  // Block b has pieces begin(b) .. begin(b + 1) - 1.
  FEWBIT_ALWAYS_INLINE int64_t begin(int64_t block) const { return pieces() * block / blocks; }
  FEWBIT_ALWAYS_INLINE int64_t block_of(int64_t piece) const {
    return ((piece + 1) * blocks - 1) / pieces();
  }
  // Where a block's part of a tile that others share is kept. It has two such parts at most: one
  // that begins its tile, which is the last of its run, and one that does not, the first.
  FEWBIT_ALWAYS_INLINE int64_t slot(int64_t block, bool begins) const {
    return 2 * block + (begins ? 1 : 0);
  }
  FEWBIT_ALWAYS_INLINE int64_t slots() const { return 2 * blocks; }
  FEWBIT_ALWAYS_INLINE bool shares() const {
    return pieces() % blocks != 0 || pieces() / blocks % depth != 0;
  }
};

FEWBIT_ALWAYS_INLINE Work work_of(const PackedProduct& a, int rows, int columns, int slab) {
  Work w{};
  w.m_tiles = ceil_div(a.m, rows);
  w.tiles = ceil_div(a.layout.panels() * panel_rows, columns) * w.m_tiles;
  w.depth = ceil_div(a.layout.columns, slab);
  w.rows = rows;
  w.columns = columns;
  w.blocks = a.blocks;
  return w;
}

// Pieces [first, last) of a tile.
struct Run {
  int64_t tile, first, last;
  bool whole;
};

// f(run) for what this block has.
template <class F>
FEWBIT_DEVICE void each_run(const Work& w, const F& f) {
  const int64_t end = w.begin(int64_t(blockIdx.x) + 1);
  for (int64_t at = w.begin(blockIdx.x); at < end;) {
    Run r;
    r.tile = at / w.depth;
    r.first = at % w.depth;
    r.last = r.first + (end - at) < w.depth ? r.first + (end - at) : w.depth;
    r.whole = r.first == 0 && r.last == w.depth;
    f(r);
    at += r.last - r.first;
  }
}

// Sums of codes over a row with one scale are kept as int32 until the end: exact in any order.
FEWBIT_ALWAYS_INLINE bool exact_parts(const PackedProduct& a) {
  return a.codes != 0 && a.layout.groups() == 1;
}

using Words = Vector<uint32_t, 4>;

// Codes of columns 4 j .. 4 j + 3 of row i of the four, one per byte.
template <int bits, int lane_words>
FEWBIT_DEVICE uint32_t quad_of_row(const Words (&w)[lane_words], int i, int j) {
  if constexpr (bits == 8) {
    return w[j].v[i];
  } else {
    uint32_t word[lane_words];
#pragma unroll
    for (int k = 0; k < lane_words; ++k) word[k] = w[k].v[i];
    return quad_of<bits>(word, j);
  }
}

// Codes to halves: a code in the low bits of 0x6400, which is 1024 and whose last bit is worth 1,
// less 1024 + z; one that lies s bits higher is worth 2^s times as much and is not shifted down:
// (1024 + 2^s q) 2^-s - (1024 2^-s + z). All of it is exact.
constexpr uint32_t half_1024 = 0x64006400u;
FEWBIT_ALWAYS_INLINE uint32_t half_twice(int exponent, int mantissa = 0) {
  return uint32_t((15 + exponent) << 10 | mantissa) * 0x00010001u;
}
// Quads of a word that a mask finds where they lie: all of those of 2 and 4 bits. 1: quad_of_row
// moves them down.
template <int bits>
constexpr int quads_in_word = bits == 2 || bits == 4 ? 8 / bits : 1;

// The zero point of a row, for each such quad.
template <int bits>
struct Zero {
  uint32_t of[quads_in_word<bits>];

  FEWBIT_DEVICE void set(uint8_t z) {
    const uint32_t low = half_1024 | z | uint32_t(z) << 16;
    of[0] = low;
#pragma unroll
    for (int j = 1; j < quads_in_word<bits>; ++j)  // (1024 - 1024 2^-s) - (1024 + z)
      of[j] = subtract_half2(half_twice(9, 1024 - (2048 >> bits * j)), low);
  }
};

// q - z of columns 0, 2 (or, `odd`, 1, 3) of quad j of row i of the four, two halves or bfloat16.
template <class X, int bits, int lane_words>
FEWBIT_DEVICE uint32_t centred(const Words (&w)[lane_words], int i, int j, int odd,
                               const Zero<bits>& zero) {
  uint32_t two;
  if constexpr (quads_in_word<bits> > 1) {
    const int s = bits * j;
    two = and_or(w[0].v[i] >> 8 * odd, ((0x00010001u << bits) - 0x00010001u) << s, half_1024);
    two = j == 0 ? subtract_half2(two, zero.of[0])
                 : multiply_add_half2(two, half_twice(-s), zero.of[j]);
  } else {
    const uint32_t quad = quad_of_row<bits>(w, i, j);
    two = subtract_half2(and_or(quad >> 8 * odd, 0x00FF00FFu, half_1024), zero.of[0]);
  }
  if constexpr (std::is_same_v<X, BFloat16>) return half2_to_bfloat2(two);
  return two;
}

// Eight neighbours of the scales at `index`, raw; to float when they are used.
struct RawScales {
  Words part[2];
};
FEWBIT_DEVICE RawScales load_scales(const void* scale, DType type, int64_t index) {
  RawScales r;
  if (type == DType::f32) {
    r.part[0] = load<4>(static_cast<const uint32_t*>(scale) + index);
    r.part[1] = load<4>(static_cast<const uint32_t*>(scale) + index + 4);
  } else {
    r.part[0] = load<4>(static_cast<const uint32_t*>(scale) + index / 2);
  }
  return r;
}
FEWBIT_DEVICE void to_floats(const RawScales& r, DType type, float (&s)[8]) {
  const auto bits = [&](int i) { return uint16_t(r.part[0].v[i / 2] >> 16 * (i % 2)); };
  if (type == DType::f32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i] = float_of(r.part[i / 4].v[i % 4]);
  } else if (type == DType::f16) {
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i] = to_float(Half{bits(i)});
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i] = to_float(BFloat16{bits(i)});
  }
}

// One result from its sum over k.
FEWBIT_DEVICE float finish(const PackedProduct& a, float sum, int64_t row, int64_t n) {
  if (a.codes) sum = sum * a.x_scale[row];
  if (a.add) sum = sum + a.add[row * a.layout.rows + n];
  return a.bias ? sum + a.bias[n] : sum;
}

FEWBIT_DEVICE void put(const PackedProduct& a, float v, int64_t at) {
  if (a.dtype == DType::f32) static_cast<float*>(a.out)[at] = v;
  if (a.dtype == DType::f16) from_float(v, static_cast<Half*>(a.out) + at);
  if (a.dtype == DType::bf16) from_float(v, static_cast<BFloat16*>(a.out) + at);
}

// Eight neighbouring sums of one row of a tile: to the result, or to the run's slot.
FEWBIT_DEVICE void put_eight(const PackedProduct& a, const Work& w, const Run& run,
                             const float (&v)[8], int64_t row, int64_t n) {
  if (row >= a.m) return;
  if (!run.whole) {
    const int64_t slot = w.slot(blockIdx.x, run.first == 0);
    float* to =
        static_cast<float*>(a.partial) + (slot * w.rows + row % w.rows) * w.columns + n % w.columns;
    store(to, Vector<float, 4>{{v[0], v[1], v[2], v[3]}});
    store(to + 4, Vector<float, 4>{{v[4], v[5], v[6], v[7]}});
    return;
  }
  const int64_t at = row * a.layout.rows + n;
  float y[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) y[i] = n + i < a.layout.rows ? finish(a, v[i], row, n + i) : 0.0f;
  if (a.layout.rows % 8 != 0) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (n + i < a.layout.rows) put(a, y[i], at + i);
  } else if (n < a.layout.rows) {
    const auto put_whole = [&](auto* out) {
      using T = element<decltype(out)>;
#pragma unroll
      for (int i = 0; i < 8; i += in_access<T>) {
        Vector<T, in_access<T>> part;
#pragma unroll
        for (int j = 0; j < in_access<T>; ++j) from_float(y[i + j], &part.v[j]);
        store(out + at + i, part);
      }
    };
    if (a.dtype == DType::f32)
      put_whole(static_cast<float*>(a.out));
    else if (a.dtype == DType::f16)
      put_whole(static_cast<Half*>(a.out));
    else
      put_whole(static_cast<BFloat16*>(a.out));
  }
}

// f(0) .. f(n - 1), unrolled: nvcc 12 leaves a long loop as it is, and what it indexes in memory.
template <int n, class F>
FEWBIT_DEVICE void each(const F& f) {
  if constexpr (n > 1) each<n - 1>(f);
  f(n - 1);
}

// `single`: codes with one scale a row of the weight, which is applied at the end.
template <class X, int bits, int tiles, int level, bool single>
FEWBIT_DEVICE void product_run(const PackedProduct& a, const Work& work, const Run& run) {
  using S = Shape<X, bits, tiles, level>;
  using Sum = std::conditional_t<S::integer, int32_t, float>;
  constexpr bool async = level >= 80;
  const PackedLayout& l = a.layout;
  const int lane = int(threadIdx.x) % warp_size, warp = int(threadIdx.x) / warp_size;
  const int g = lane / 4, t = lane % 4;
  const int64_t m0 = run.tile % work.m_tiles * S::rows;
  const int64_t pair = run.tile / work.m_tiles * product_warps + warp;
  const int64_t groups = l.groups(), last_panel = l.panels() - 1;
  // What this lane loads: four rows of one panel. What it ends with: eight columns of another.
  const int64_t in_panel = 2 * pair + g / 4 < last_panel ? 2 * pair + g / 4 : last_panel;
  const int64_t out_panel = 2 * pair + t / 2 < last_panel ? 2 * pair + t / 2 : last_panel;
  const int64_t in_zero = in_panel * groups * panel_rows + 4 * (g % 4);
  const int64_t out_scale = out_panel * groups * panel_rows + 8 * (t % 2);
  const uint32_t* words =
      a.packed + in_panel * l.panel_words() + t * S::lane_words * panel_rows + 4 * (g % 4);

  const int steps = int(l.columns / S::step), first = int(run.first), last = int(run.last);
  const int group_steps = int(l.group_size / S::step);
  const bool exact = single || exact_parts(a);

  unsigned char* const ring = dynamic_shared();
  Words x_next[S::x_loads] = {}, w_next[S::w_loads] = {}, w[S::w_loads] = {};
  // What this thread fetches of a slab of x: 16 bytes of some rows, x_row and x_byte.
  const auto x_row = [&](int i) {
    return (int(threadIdx.x) + i * product_threads) / (S::row_bytes / 16);
  };
  const int x_byte = int(threadIdx.x) % (S::row_bytes / 16) * 16;
  static_assert(product_threads % (S::row_bytes / 16) == 0);
  const auto x_at = [&](int i, int stage) {
    return ring + stage * S::x_bytes + x_row(i) * S::pitch + x_byte;
  };
  const auto w_at = [&](int i, int stage) {
    return ring + S::stages * S::x_bytes + stage * S::w_bytes +
           (int(threadIdx.x) + i * product_threads) * 16;
  };
  const unsigned char* x_from[S::x_loads];
  uint32_t x_inside = 0;  // bit i: row x_row(i) is one of x
#pragma unroll
  for (int i = 0; i < S::x_loads; ++i) {
    const int64_t row = m0 + x_row(i);
    x_from[i] = static_cast<const unsigned char*>(a.x);
    if (row >= a.m || (S::x_pieces % product_threads != 0 && x_row(i) >= S::rows)) continue;
    x_from[i] += (row * l.columns + int64_t(first) * S::slab) * S::x_bits / 8 + x_byte;
    x_inside |= 1u << i;
  }
  const uint32_t* w_from = words + int64_t(first) * S::steps * 4 * S::lane_words * panel_rows;
  int fetched = first, to_stage = 0;  // the next slab that is fetched, and where to

  // Level 80: copies into the ring, some slabs ahead. Level 75: one slab ahead, in registers.
  const auto fetch = [&] {
    const int x_left = int(l.columns) - fetched * S::slab - x_byte * 8 / S::x_bits;
    const bool x_fetched = fetched < last && x_left > 0;
#pragma unroll
    for (int i = 0; i < S::x_loads; ++i) {
      if (S::x_pieces % product_threads != 0 && x_row(i) >= S::rows) continue;
      const bool inside = x_fetched && (x_inside >> i & 1) != 0;
      if constexpr (async)
        copy_16<level>(x_at(i, to_stage), inside ? x_from[i] : a.x, inside);
      else
        x_next[i] = inside ? load<4>(reinterpret_cast<const uint32_t*>(x_from[i])) : Words{};
      if (inside) x_from[i] += S::row_bytes;
    }
#pragma unroll
    for (int i = 0; i < S::w_loads; ++i) {
      const bool inside = fetched < last && fetched * S::steps + i / S::lane_words < steps;
      const uint32_t* from =
          w_from + (i / S::lane_words * 4 * S::lane_words + i % S::lane_words) * panel_rows;
      if constexpr (async)
        copy_16<level>(w_at(i, to_stage), inside ? from : words, inside);
      else
        w_next[i] = inside ? load<4>(from) : Words{};
    }
    end_copies<level>();
    w_from += S::steps * 4 * S::lane_words * panel_rows;
    ++fetched;
    to_stage = to_stage + 1 < S::stages ? to_stage + 1 : 0;
  };
  const auto land = [&](int stage) {
    if constexpr (async) {
      wait_for_copies<level, S::stages - 2>();
#pragma unroll
      for (int i = 0; i < S::w_loads; ++i)  // a thread reads what it copied itself
        w[i] = load<4>(reinterpret_cast<uint32_t*>(w_at(i, stage)));
    } else {
#pragma unroll
      for (int i = 0; i < S::x_loads; ++i) {
        if (S::x_pieces % product_threads != 0 && x_row(i) >= S::rows) continue;
        *reinterpret_cast<Words*>(x_at(i, stage)) = x_next[i];
      }
#pragma unroll
      for (int i = 0; i < S::w_loads; ++i) w[i] = w_next[i];
    }
    __syncthreads();
  };

  float total[single ? 1 : tiles][4][4] = {};
  Sum sum[tiles][4][4] = {};
  int32_t x_sum[tiles][2] = {};  // of codes over the group so far, this lane's columns
  Zero<bits> zero[4] = {};
  RawScales scales = {};
  // The group's sums of codes less what zero points add, in place.
  const auto centre = [&](int group) {
    const Vector<uint8_t, 8> z = load<8>(a.zero_point + out_scale + group * panel_rows);
    // Of a group in parts, the part that begins it takes the whole of the code sum.
    const bool begins = group * group_steps >= first * S::steps;
#pragma unroll
    for (int mt = 0; mt < tiles; ++mt)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int32_t s = x_sum[mt][h];
        s += __shfl_xor_sync(full_warp, s, 1);
        s += __shfl_xor_sync(full_warp, s, 2);
        const int64_t row = m0 + mt * 16 + h * 8 + g;
        const int32_t za = a.x_zero && begins && row < a.m ? a.x_zero[row] : 0;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            Sum& v = sum[mt][i][2 * h + e];
            v -= int32_t(z.v[4 * e + i]) * s;
            if (a.x_zero) v -= za * a.code_sum[out_scale + group * panel_rows + 4 * e + i];
          }
        x_sum[mt][h] = 0;
      }
  };
  // A sum times its scale; of a part whose sum is to stay exact, its bits.
  float by[8] = {};
  const auto scaled = [&](Sum v, int i, int e) {
    if (S::integer && exact && !run.whole) return float_of(uint32_t(v));
    return float(v) * by[4 * e + i];
  };
  // The group's sums into the total.
  const auto flush = [&](int group) {
    if constexpr (S::integer) centre(group);
    to_floats(scales, a.scale_dtype, by);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int mt = 0; mt < tiles; ++mt)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            Sum& v = sum[mt][i][2 * h + e];
            float& to = total[mt][i][2 * h + e];
            // Exact parts have one group: the total is still 0, and bits are kept as they are.
            to = S::integer && exact && !run.whole ? scaled(v, i, e)
                                                   : fmaf(float(v), by[4 * e + i], to);
            v = 0;
          }
  };

#pragma unroll
  for (int s = 0; s < S::stages - 1; ++s) fetch();
  int group = single ? 0 : first * S::steps / group_steps;
  int in_group = single ? 0 : first * S::steps - group * group_steps;  // steps of it so far
  bool begins = true;  // a group, as far as this run has it
  for (int slab = first, stage = 0; slab < last; ++slab) {
    land(stage);
    fetch();
    const unsigned char* const x = ring + stage * S::x_bytes;
    stage = stage + 1 < S::stages ? stage + 1 : 0;
#pragma unroll
    for (int c = 0; c < S::steps; ++c) {
      const int step = slab * S::steps + c;
      if (step >= steps) break;
      if constexpr (!single) {
        if (begins) {
          begins = false;
          scales = load_scales(a.scale, a.scale_dtype, out_scale + int64_t(group) * panel_rows);
          if constexpr (!S::integer) {
            const Vector<uint8_t, 4> z =
                load<4>(a.zero_point + in_zero + int64_t(group) * panel_rows);
#pragma unroll
            for (int i = 0; i < 4; ++i) zero[i].set(z.v[i]);
          }
        }
      }
      Words step_words[S::lane_words];
#pragma unroll
      for (int i = 0; i < S::lane_words; ++i) step_words[i] = w[c * S::lane_words + i];
#pragma unroll
      for (int part = 0; part < S::lane_columns / S::chunk; ++part) {
        constexpr int registers = S::chunk * S::x_bits / 32;  // that hold a chunk of x
        Vector<uint32_t, registers> left[tiles][2];
#pragma unroll
        for (int mt = 0; mt < tiles; ++mt)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int column = c * S::step + t * S::lane_columns + S::chunk * part;
            const unsigned char* from =
                x + (mt * 16 + h * 8 + g) * S::pitch + column * S::x_bits / 8;
            left[mt][h] = load<registers>(reinterpret_cast<const uint32_t*>(from));
            if constexpr (S::integer) x_sum[mt][h] = add_codes<X>(left[mt][h].v, x_sum[mt][h]);
          }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (S::integer) {
            uint32_t right[2];
            if constexpr (S::fours) {  // as they lie
              right[0] = step_words[0].v[i];
              right[1] = step_words[1].v[i];
            } else {
              right[0] = quad_of_row<bits>(step_words, i, 2 * part);
              right[1] = quad_of_row<bits>(step_words, i, 2 * part + 1);
            }
#pragma unroll
            for (int mt = 0; mt < tiles; ++mt) {
              const uint32_t rows[4] = {left[mt][0].v[0], left[mt][1].v[0], left[mt][0].v[1],
                                        left[mt][1].v[1]};
              multiply<level, X>(sum[mt][i], rows, right);
            }
          } else {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const uint32_t right[2] = {centred<X, bits>(step_words, i, 2 * part + j, 0, zero[i]),
                                         centred<X, bits>(step_words, i, 2 * part + j, 1, zero[i])};
#pragma unroll
              for (int mt = 0; mt < tiles; ++mt) {
                const uint32_t *p = left[mt][0].v + 2 * j, *q = left[mt][1].v + 2 * j;
                const uint32_t rows[4] = {
                    __byte_perm(p[0], p[1], 0x5410), __byte_perm(q[0], q[1], 0x5410),
                    __byte_perm(p[0], p[1], 0x7632), __byte_perm(q[0], q[1], 0x7632)};
                multiply<level, X>(sum[mt][i], rows, right);
              }
            }
          }
        }
      }
      if constexpr (!single) {
        const bool ends = ++in_group == group_steps;
        if (ends || step + 1 == steps || (slab + 1 == last && c + 1 == S::steps)) {
          flush(group);
          begins = true;
          ++group;
          in_group = 0;
        }
      }
    }
  }
  if constexpr (single) {
    scales = load_scales(a.scale, a.scale_dtype, out_scale);
    centre(0);
    to_floats(scales, a.scale_dtype, by);
  }

  each<tiles>([&](int mt) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = m0 + mt * 16 + h * 8 + g, n = pair * warp_rows + 8 * t;
      float v[8];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if constexpr (single)
            v[packed_row(e, i)] = scaled(sum[mt][i][2 * h + e], i, e);
          else
            v[packed_row(e, i)] = total[mt][i][2 * h + e];
        }
      put_eight(a, work, run, v, row, n);
    }
  });
  wait_for_copies<level, 0>();  // the next run fills the ring anew
  __syncthreads();
}

template <class X, int bits, int tiles, int level, bool single>
FEWBIT_DEVICE void product_block(const PackedProduct& a) {
  using S = Shape<X, bits, tiles, level>;
  const Work work = work_of(a, S::rows, product_columns, S::slab);
  each_run(work, [&](const Run& run) { product_run<X, bits, tiles, level, single>(a, work, run); });
}

}  // namespace fewbit::cuda
