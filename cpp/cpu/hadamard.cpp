#include "fewbit/hadamard.h"

#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

constexpr int block_stages = 12;  // of butterflies on 2^12 floats, which stay in L1
constexpr int lane_stages = F32::width == 16 ? 4 : F32::width == 8 ? 3 : 0;
// Butterflies that one pass over memory does: 2^radix vectors are held in registers.
constexpr int max_radix = F32::width == 16 ? 4 : 3;
constexpr int64_t few = 16;  // columns that every step of a base can take
// Of tables, that stay in L1: 28 of the 32 KiB that the smallest one has.
constexpr int64_t near_floats = HadamardBase::most_bundles * HadamardBase::table * 32;

// Asks for the next row, as many lines in each of `passes` passes over this one as they work on:
// memory, which rests while a pass runs in the caches, is then never the slowest.
struct Ahead {
  const char* at;
  const char* end;
  int passes;
  bool near;  // to the first-level cache, not the second
  int owed = 0;
  FEWBIT_INLINE_MEMBER void step(int lines) {
    for (owed += lines; owed >= passes && at < end; owed -= passes, at += line)
      near ? __builtin_prefetch(at) : ask_later(at);
  }
};

// Where results go: times `scale`, and past the caches if they are float32 and `past`.
struct Finish {
  float scale;
  bool past;
  template <class T>
  FEWBIT_INLINE_MEMBER void put(F32 v, T* to) const {
    if (scale != 1.0f) v = v * F32::set(scale);
    if constexpr (sizeof(T) == 4)
      if (past) return v.stream(to);
    v.store(to);
  }
};
constexpr Finish keep{1.0f, false};

// Butterflies across count vectors, on strides half, 2 half, .. count / 2.
template <int count, int half>
FEWBIT_INLINE void across(F32 (&v)[count]) {
  if constexpr (half < count) {
#pragma GCC unroll 16
    for (int i = 0; i < count / 2; ++i) {
      const int r = i / half * 2 * half + i % half;
      const F32 a = v[r], c = v[r + half];
      v[r] = a + c;
      v[r + half] = a - c;
    }
    across<count, half * 2>(v);
  }
}

// Where a pass reads.
template <class T>
struct Source {
  const T* at;
  const float* signs;  // or null
  FEWBIT_INLINE_MEMBER F32 load(int64_t i) const {
    const F32 v = F32::load(at + i);
    return signs ? v * F32::load(signs + i) : v;
  }
};

constexpr int64_t block = int64_t(1) << block_stages;

// Block `which` of 2^stages after the butterflies on strides of a block and more, done as it is
// read. To store them first would cost each line two more moves between the first and the second
// cache; from eight blocks on, reading all of them for one costs more than that.
template <int stages, class T>
struct Folded {
  static constexpr int count = 1 << stages;
  Source<T> from;
  float sign[stages];  // of the second input on stride block << i

  FEWBIT_INLINE_MEMBER Folded(Source<T> from, int64_t which) : from(from) {
    for (int i = 0; i < stages; ++i) sign[i] = which >> i & 1 ? -1.0f : 1.0f;
  }
  FEWBIT_INLINE_MEMBER F32 load(int64_t i) const {
    F32 v[count];
#pragma GCC unroll 16
    for (int r = 0; r < count; ++r) v[r] = from.load(i + r * block);
#pragma GCC unroll 16
    for (int s = 0; s < stages; ++s)
#pragma GCC unroll 16
      for (int r = 0; r < count >> (s + 1); ++r) v[r] = v[2 * r] + v[2 * r + 1] * F32::set(sign[s]);
    return v[0];
  }
};

// One pass: `radix` stages on strides first, 2 first, .. over [0, n); with `lanes`, the stages
// inside a vector come first (and the strides start at one vector).
template <int radix, bool lanes, class In, class Out>
FEWBIT_INLINE void pass(In in, Out* out, int64_t n, int64_t first, Finish finish, Ahead& ahead) {
  constexpr int count = 1 << radix;
  for (int64_t b = 0; b < n; b += first * count) {
    for (int64_t j = b; j < b + first; j += F32::width) {
      F32 v[count];
#pragma GCC unroll 16
      for (int r = 0; r < count; ++r) {
        v[r] = in.load(j + r * first);
        if constexpr (lanes) v[r] = butterflies<lane_stages>(v[r]);
      }
      ahead.step(count * F32::width / 16);
      across<count, 1>(v);
#pragma GCC unroll 16
      for (int r = 0; r < count; ++r) finish.put(v[r], out + j + r * first);
    }
  }
}

template <bool lanes, class In, class Out>
FEWBIT_INLINE void pass_of(int radix, In in, Out* out, int64_t n, int64_t first, Finish finish,
                           Ahead& ahead) {
  switch (radix) {
    case 0: pass<0, lanes>(in, out, n, first, finish, ahead); break;
    case 1: pass<1, lanes>(in, out, n, first, finish, ahead); break;
    case 2: pass<2, lanes>(in, out, n, first, finish, ahead); break;
    case 3: pass<3, lanes>(in, out, n, first, finish, ahead); break;
    case 4:
      if constexpr (max_radix >= 4) pass<4, lanes>(in, out, n, first, finish, ahead);
      break;
  }
}

// Passes over a stretch of 2^k that stays in L1.
FEWBIT_INLINE int passes_of(int k) {
  const int left = k - lane_stages;  // strides of one vector and more
  return left > 0 ? (left + max_radix - 1) / max_radix : 1;
}

// x H_{2^k} of one stretch that stays in L1, unnormalised; 2^k >= F32::width.
template <class In, class Out>
static void sylvester_in_block(In in, float* buffer, Out* out, int k, Finish finish, Ahead& ahead) {
  const int64_t n = int64_t(1) << k;
  const Source<float> again{buffer, nullptr};
  int64_t first = F32::width;
  int left = k - lane_stages;
  for (int passes = passes_of(k), p = 0; p < passes; ++p) {
    // Even passes: 10 stages are 4 + 3 + 3 rather than 4 + 4 + 2.
    const int radix = (left + passes - p - 1) / (passes - p);
    const bool last = p + 1 == passes;
    left -= radix;
    if (p == 0 && last)
      pass_of<true>(radix, in, out, n, first, finish, ahead);
    else if (p == 0)
      pass_of<true>(radix, in, buffer, n, first, keep, ahead);
    else if (last)
      pass_of<false>(radix, again, out, n, first, finish, ahead);
    else
      pass_of<false>(radix, again, buffer, n, first, keep, ahead);
    first <<= radix;
  }
}

// The same of any stretch; out is not what is read, but may be the buffer.
template <class T, class Out>
static void sylvester(Source<T> in, float* buffer, Out* out, int k, Finish finish, Ahead& ahead) {
  static_assert(Hadamard::max_width == block << 3);
  if (k <= block_stages) return sylvester_in_block(in, buffer, out, k, finish, ahead);
  alignas(64) float part[block];
  const auto block_of = [&](auto from, int64_t b) {
    sylvester_in_block(from, part, out + b * block, block_stages, finish, ahead);
  };
  const int64_t blocks = int64_t(1) << (k - block_stages);
  if (blocks == 8) pass<3, false>(in, buffer, 8 * block, block, keep, ahead);
  for (int64_t b = 0; b < blocks; ++b) switch (blocks) {
      case 2: block_of(Folded<1, T>(in, b), b); break;
      case 4: block_of(Folded<2, T>(in, b), b); break;
      case 8: block_of(Source<float>{buffer + b * block, nullptr}, b); break;
    }
}

// The same for 2^k below a vector, on all stretches of a row.
template <int k, class T>
static void short_sylvester(const T* x, float* z, int64_t width, const float* signs) {
  int64_t i = 0;
  for (; i + F32::width <= width; i += F32::width) {
    F32 v = F32::load(x + i);
    if (signs) v = v * F32::load(signs + i);
    butterflies<k>(v).store(z + i);
  }
  for (int64_t j = i; j < width; ++j) z[j] = signs ? to_float(x[j]) * signs[j] : to_float(x[j]);
  for (int64_t half = 1; half < int64_t(1) << k; half *= 2)
    for (int64_t j = i; j < width; ++j)
      if (!(j & half)) {
        const float p = z[j], q = z[j + half];
        z[j] = p + q;
        z[j + half] = p - q;
      }
}

// The eight sums of four vectors that add the first, `stride` apart (HadamardBase::table).
FEWBIT_INLINE void tabulate(const F32 (&x)[4], float* table, int64_t stride) {
  const F32 low[2] = {x[0] + x[1], x[0] - x[1]};
  const F32 high[4] = {x[2] + x[3], x[3] - x[2], x[2] - x[3], F32::zero() - (x[2] + x[3])};
#pragma GCC unroll 8
  for (int p = 0; p < 8; ++p) (low[p & 1] + high[p >> 1]).store(table + p * stride);
}

// y = B^T z for `columns` columns of z, rows `from` apart, through tables; y, rows `to` apart, may
// be z.
template <int columns, bool paired, class T>
static void by_tables(const HadamardBase& base, const float* z, int64_t from, T* y, int64_t to,
                      Finish finish, Ahead& ahead) {
  constexpr int lanes = paired ? 2 * columns : columns;  // sums of pairs, then differences
  constexpr int side = columns / F32::width, vectors = lanes / F32::width;
  constexpr int outputs = vectors >= 8 ? 1 : 8 / vectors;  // so that 8 sums are under way
  constexpr int64_t bundle = HadamardBase::bundle, table = HadamardBase::table * lanes;
  const int64_t order = base.order(), bundles = base.bundles(), step = base.step_bundles();
  alignas(64) float tables[near_floats];
  alignas(64) float sums[HadamardBase::max_tables / (paired ? 2 : 1) * lanes];
  const uint16_t* places = base.places;
  const uint8_t* added = base.added;
  for (int64_t g0 = 0; g0 < bundles; g0 += step, places += order, added += order) {
    const int64_t count = bundles - g0 < step ? bundles - g0 : step;
    for (int64_t g = 0; g < count; ++g)
      for (int v = 0; v < side; ++v) {
        F32 sum[bundle], difference[bundle];
        float* entries = tables + g * table + v * F32::width;
        for (int i = 0; i < bundle; ++i) {
          const int64_t r = (g0 + g) * bundle + i;
          const float* row = z + (paired ? 2 * r : r) * from + v * F32::width;
          sum[i] = r < order ? F32::load(row) : F32::zero();
          if constexpr (paired) {
            const F32 second = r < order ? F32::load(row + from) : F32::zero();
            difference[i] = sum[i] - second;
            sum[i] = sum[i] + second;
          }
        }
        tabulate(sum, entries, lanes);
        if constexpr (paired) tabulate(difference, entries + columns, lanes);
      }
    const bool start = g0 == 0, end = g0 + count == bundles;
    for (int64_t first = 0, last = 0; first < order; first = last) {
      const int64_t plus = added[first];
      while (last < order && added[last] == plus) ++last;
      in_counts<outputs>(first, last, [&](auto some, int64_t j) {
        constexpr int here = some.value;
        const uint8_t* term = base.terms + g0 * order + j;
        F32 sum[here][vectors];
#pragma GCC unroll 8
        for (int i = 0; i < here; ++i)
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v)
            sum[i][v] =
                start ? F32::zero() : F32::load(sums + places[j + i] * lanes + v * F32::width);
        int64_t t = 0;
        const auto take = [&](int64_t stop, const auto& add) {
          for (; t < stop; ++t) {
            uint64_t all = 0;  // in one load: a vector's takes as long as two of these
            __builtin_memcpy(&all, term + t * order, here);
#pragma GCC unroll 8
            for (int i = 0; i < here; ++i) {
              const float* entry = tables + int64_t(all >> 8 * i & 255u) * lanes;
#pragma GCC unroll 8
              for (int v = 0; v < vectors; ++v)
                sum[i][v] = add(sum[i][v], F32::load(entry + v * F32::width));
            }
          }
        };
        take(plus, [](F32 a, F32 b) { return a + b; });
        take(count, [](F32 a, F32 b) { return a - b; });
        if (end) ahead.step(here * lanes / 16);
#pragma GCC unroll 8
        for (int i = 0; i < here; ++i) {
          const int64_t o = places[j + i];
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) {
            if (!end) {
              sum[i][v].store(sums + o * lanes + v * F32::width);
            } else if constexpr (!paired) {
              finish.put(sum[i][v], y + o * to + v * F32::width);
            } else if (v < side) {
              // Less twice the other of the pair, read before either is written.
              const F32 minus = F32::set(-2.0f);
              const float* pair = z + 2 * o * from + v * F32::width;
              const F32 one = F32::load(pair), other = F32::load(pair + from);
              T* at = y + 2 * o * to + v * F32::width;
              finish.put(fma(other, minus, sum[i][v]), at);
              finish.put(fma(one, minus, sum[i][v + side]), at + to);
            }
          }
        }
      });
    }
  }
}

// y = B^T z by multiply-adds, for columns and rows as above; y is not z.
template <int columns, class T>
static void by_products(const HadamardBase& base, const float* z, int64_t from, T* y, int64_t to,
                        Finish finish, Ahead& ahead) {
  constexpr int vectors = columns / F32::width;
  constexpr int outputs = vectors >= 8 ? 1 : vectors == 4 ? 4 : 8 / vectors;
  const int64_t m = base.m;
  in_counts<outputs>(0, m, [&](auto some, int64_t o) {
    constexpr int here = some.value;
    F32 sum[here][vectors];
    for (int i = 0; i < here; ++i)
      for (int v = 0; v < vectors; ++v) sum[i][v] = F32::zero();
    for (int64_t r = 0; r < m; ++r) {
      F32 x[vectors];
      for (int v = 0; v < vectors; ++v) x[v] = F32::load(z + r * from + v * F32::width);
#pragma GCC unroll 8
      for (int i = 0; i < here; ++i) {
        const F32 b = F32::set(base.products[r * m + o + i]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[i][v] = fma(x[v], b, sum[i][v]);
      }
    }
    ahead.step(here * columns / 16);
#pragma GCC unroll 8
    for (int i = 0; i < here; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) finish.put(sum[i][v], y + (o + i) * to + v * F32::width);
  });
}

// The same through sums and differences of mirrored rows.
template <int columns>
constexpr int64_t most_folded =
    16384 / columns;  // rows of them that stay in the second-level cache
template <int columns, class T>
static void by_halves(const HadamardBase& base, const float* z, int64_t from, T* y, int64_t to,
                      Finish finish, Ahead& ahead) {
  constexpr int vectors = columns / F32::width;
  constexpr int outputs = vectors >= 4 ? 2 : 8 / vectors;
  alignas(64) float folded[2][most_folded<columns> / 2 + 1][columns];
  const int64_t m = base.m, half = base.half();
  for (int64_t i = 0; i < half; ++i)
    for (int v = 0; v < vectors; ++v) {
      const F32 a = F32::load(z + i * from + v * F32::width);
      const F32 b = i == 0 ? F32::zero() : F32::load(z + (m - i) * from + v * F32::width);
      (a + b).store(folded[0][i] + v * F32::width);
      (a - b).store(folded[1][i] + v * F32::width);
    }
  in_counts<outputs>(0, half, [&](auto some, int64_t o) {
    constexpr int here = some.value;
    F32 sum[2][here][vectors];
    for (int s = 0; s < 2; ++s)
      for (int i = 0; i < here; ++i)
        for (int v = 0; v < vectors; ++v) sum[s][i][v] = F32::zero();
    for (int64_t r = 0; r < half; ++r)
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s) {
        const float* b = base.halves + (s * half + r) * half + o;
        F32 x[vectors];
        for (int v = 0; v < vectors; ++v) x[v] = F32::load(folded[s][r] + v * F32::width);
#pragma GCC unroll 8
        for (int i = 0; i < here; ++i) {
          const F32 factor = F32::set(b[i]);
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) sum[s][i][v] = fma(x[v], factor, sum[s][i][v]);
        }
      }
    ahead.step(2 * here * columns / 16);
#pragma GCC unroll 8
    for (int i = 0; i < here; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const F32 even = sum[0][i][v], odd = sum[1][i][v];
        finish.put(even + odd, y + (o + i) * to + v * F32::width);
        if (o + i > 0) finish.put(even - odd, y + (m - o - i) * to + v * F32::width);
      }
  });
}

// The same with the outputs of one column across the lanes, for columns that lie apart.
template <class T>
static void by_column(const HadamardBase& base, const float* z, int64_t inner, float* column, T* y,
                      float scale) {
  const int64_t m = base.m;
  for (int64_t c = 0; c < inner; ++c) {
    int64_t o = 0;
    for (; o + F32::width <= m; o += F32::width) {
      F32 sum = F32::zero();
      for (int64_t i = 0; i < m; ++i)
        sum = fma(F32::set(z[i * inner + c]), F32::load(base.products + i * m + o), sum);
      sum.store(column + o);
    }
    for (; o < m; ++o) {
      float sum = 0.0f;
      for (int64_t i = 0; i < m; ++i)
        sum = __builtin_fmaf(z[i * inner + c], base.products[i * m + o], sum);
      column[o] = sum;
    }
    for (int64_t i = 0; i < m; ++i) from_float(column[i] * scale, y + i * inner + c);
  }
}

// Columns of one matrix [m, inner] that lie side by side, as many at a time as tables allow.
template <class T>
static void side_by_side(const HadamardBase& base, const float* z, int64_t inner, T* y,
                         Finish finish, Ahead& ahead) {
  for (int64_t c = 0; c < inner;) {
    const auto step = [&](auto run, int columns) {
      run(base, z + c, inner, y + c, inner, finish, ahead);
      c += columns;
    };
    const int64_t left = inner - c;
    // Wide tables where all of them stay in L1: a term is read once for more columns.
    const int wide = base.bundles() <= HadamardBase::most_bundles / 2 ? 64 : 32;
    constexpr int broad = F32::width == 16 ? 64 : few;  // as the registers allow
    if (base.halves && base.m <= most_folded<broad> && left >= broad)
      step(by_halves<broad, T>, broad);
    else if (base.halves && base.m <= most_folded<few>)
      step(by_halves<few, T>, few);
    else if (!base.terms && left >= 64)
      step(by_products<64, T>, 64);
    else if (!base.terms)
      step(by_products<few, T>, few);
    else if (base.paired && wide == 64 && left >= 32)
      step(by_tables<32, true, T>, 32);
    else if (base.paired)
      step(by_tables<few, true, T>, few);
    else if (wide == 64 && left >= 64)
      step(by_tables<64, false, T>, 64);
    else if (left >= 32)
      step(by_tables<32, false, T>, 32);
    else
      step(by_tables<few, false, T>, few);
  }
}

// Columns of all matrices [outer, m, inner], brought together `few` at a time. run: this many
// neighbours stay together.
template <int run, class T>
static void brought_together(const HadamardBase& base, const float* z, int64_t outer, int64_t inner,
                             T* y, float scale, Ahead& ahead) {
  alignas(64) float panel[HadamardBase::max_tables * few];
  const int64_t m = base.m;
  for (int64_t j = 0; j < outer * inner; j += few) {
    int64_t place[few / run];
    const int64_t left = outer * inner - j;
    const int64_t runs = (left < few ? left : few) / run;
    for (int64_t r = 0; r < runs; ++r)
      place[r] = (j + r * run) / inner * m * inner + (j + r * run) % inner;
    if (left < few) __builtin_memset(panel, 0, size_t(m * few * 4));
    for (int64_t i = 0; i < m; ++i)
      for (int64_t r = 0; r < runs; ++r)
        __builtin_memcpy(panel + i * few + r * run, z + place[r] + i * inner, run * 4);
    if (base.paired)
      by_tables<few, true>(base, panel, few, panel, few, {scale, false}, ahead);
    else
      by_tables<few, false>(base, panel, few, panel, few, {scale, false}, ahead);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t r = 0; r < runs; ++r)
        for (int e = 0; e < run; ++e)
          from_float(panel[i * few + r * run + e], y + place[r] + i * inner + e);
  }
}

template <class T>
static void apply(const HadamardBase& base, const float* z, int64_t width, int64_t inner, T* y,
                  Finish finish, Ahead& ahead) {
  alignas(64) float column[Hadamard::max_width];
  const int64_t matrix = base.m * inner;
  if (inner % few == 0)
    for (int64_t b = 0; b < width; b += matrix)
      side_by_side(base, z + b, inner, y + b, finish, ahead);
  else if (!base.terms)
    for (int64_t b = 0; b < width; b += matrix)
      by_column(base, z + b, inner, column, y + b, finish.scale);
  else if (inner % 8 == 0)
    brought_together<8>(base, z, width / matrix, inner, y, finish.scale, ahead);
  else if (inner % 4 == 0)
    brought_together<4>(base, z, width / matrix, inner, y, finish.scale, ahead);
  else
    brought_together<1>(base, z, width / matrix, inner, y, finish.scale, ahead);
}

template <class T>
static void rows(const Hadamard& a, int64_t begin, int64_t end) {
  alignas(64) float z[Hadamard::max_width];
  alignas(64) float spare[Hadamard::max_width];  // by_products cannot write where it reads
  const int64_t n = int64_t(1) << a.k;
  const Finish finish{a.scale, a.past};
  const int passes =
      passes_of(a.k < block_stages ? a.k : block_stages) + (n > 4 * block) + int(a.count);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.width;
    T* y = static_cast<T*>(a.y) + r * a.width;
    Ahead ahead{(const char*)(x + a.width), (const char*)(x + (r + 1 < end ? 2 : 1) * a.width),
                passes, a.width <= block / 2};
    const Source<T> in{x, a.signs};
    if (a.k < lane_stages) {
      if (a.k == 0)
        short_sylvester<0>(x, z, a.width, a.signs);
      else if (a.k == 1)
        short_sylvester<1>(x, z, a.width, a.signs);
      else if (a.k == 2)
        short_sylvester<2>(x, z, a.width, a.signs);
      else
        short_sylvester<3>(x, z, a.width, a.signs);
      if (a.count == 0)
        for (int64_t i = 0; i < a.width; ++i) from_float(z[i] * a.scale, y + i);
    } else if (a.count == 0) {
      sylvester(in, z, y, a.k, finish, ahead);
    } else if (a.k <= lane_stages + max_radix) {  // all stretches in one pass
      pass_of<true>(a.k - lane_stages, in, z, a.width, F32::width, keep, ahead);
    } else {
      for (int64_t b = 0; b < a.width; b += n)
        sylvester(Source<T>{x + b, a.signs ? a.signs + b : nullptr}, z + b, z + b, a.k, keep,
                  ahead);
    }
    float* from = z;
    int64_t inner = n;
    for (int64_t i = a.count - 1; i >= 0; inner *= a.bases[i--].m) {
      float* to = a.bases[i].terms ? from : from == z ? spare : z;
      if (i == 0)
        apply(a.bases[i], from, a.width, inner, y, finish, ahead);
      else
        apply(a.bases[i], from, a.width, inner, to, keep, ahead);
      from = to;
    }
  }
  if (a.past) stream_end();
}

void kernel(const Hadamard& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto* t) { rows<element<decltype(t)>>(a, begin, end); });
}

}  // namespace fewbit::cpu::FEWBIT_ISA
