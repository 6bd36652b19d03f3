#include "fewbit/hadamard.h"

#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

constexpr int64_t block = 4096;  // floats whose butterflies stay in L1
constexpr int lane_stages = F32::width == 16 ? 4 : F32::width == 8 ? 3 : 0;
// Butterflies that one pass over memory does: 2^radix vectors are held in registers.
constexpr int max_radix = F32::width == 16 ? 4 : 3;

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

// One pass: `radix` stages on strides first, 2 first, .. over [0, n); with `lanes`, the stages
// inside a vector come first (and the strides start at one vector).
template <int radix, bool lanes, class In, class Out>
FEWBIT_INLINE void pass(const In* in, Out* out, int64_t n, int64_t first, const float* signs,
                        float scale) {
  constexpr int count = 1 << radix;
  for (int64_t b = 0; b < n; b += first * count) {
    for (int64_t j = b; j < b + first; j += F32::width) {
      F32 v[count];
#pragma GCC unroll 16
      for (int r = 0; r < count; ++r) {
        v[r] = F32::load(in + j + r * first);
        if constexpr (lanes) {
          if (signs) v[r] = v[r] * F32::load(signs + j + r * first);
          v[r] = butterflies(v[r]);
        }
      }
      across<count, 1>(v);
#pragma GCC unroll 16
      for (int r = 0; r < count; ++r) {
        if (scale != 1.0f) v[r] = v[r] * F32::set(scale);
        v[r].store(out + j + r * first);
      }
    }
  }
}

template <bool lanes, class In, class Out>
FEWBIT_INLINE void pass_of(int radix, const In* in, Out* out, int64_t n, int64_t first,
                           const float* signs, float scale) {
  switch (radix) {
    case 0: pass<0, lanes>(in, out, n, first, signs, scale); break;
    case 1: pass<1, lanes>(in, out, n, first, signs, scale); break;
    case 2: pass<2, lanes>(in, out, n, first, signs, scale); break;
    case 3: pass<3, lanes>(in, out, n, first, signs, scale); break;
    case 4:
      if constexpr (max_radix >= 4) pass<4, lanes>(in, out, n, first, signs, scale);
      break;
  }
}

// x H_{2^k} of one stretch, unnormalised but times `scale`; 2^k >= Hadamard::lanes.
template <class In, class Out>
static void sylvester(const In* in, float* buffer, Out* out, int k, const float* signs,
                      float scale) {
  const int64_t n = int64_t(1) << k;
  const int64_t part = n < block ? n : block;
  int stages = k - lane_stages;  // strides of one vector and more
  const int inner = part < n ? int(__builtin_ctzll(uint64_t(part))) - lane_stages : stages;
  int64_t first = F32::width;
  for (int64_t b = 0; b < n; b += part) {
    int left = inner;
    first = F32::width;
    bool begun = false;
    do {
      // Even passes: 10 stages are 4 + 3 + 3 rather than 4 + 4 + 2.
      const int passes = left ? (left + max_radix - 1) / max_radix : 1;
      const int radix = (left + passes - 1) / passes;
      left -= radix;
      const bool last = left == 0 && part == n;
      if (!begun && last)
        pass_of<true>(radix, in + b, out + b, part, first, signs, scale);
      else if (!begun)
        pass_of<true>(radix, in + b, buffer + b, part, first, signs ? signs + b : signs, 1.0f);
      else if (last)
        pass_of<false>(radix, buffer + b, out + b, part, first, nullptr, scale);
      else
        pass_of<false>(radix, buffer + b, buffer + b, part, first, nullptr, 1.0f);
      first <<= radix;
      begun = true;
    } while (left > 0);
  }
  for (stages -= inner; stages > 0;) {
    const int radix = stages < max_radix ? stages : max_radix;
    stages -= radix;
    if (stages == 0)
      pass_of<false>(radix, buffer, out, n, first, nullptr, scale);
    else
      pass_of<false>(radix, buffer, buffer, n, first, nullptr, 1.0f);
    first <<= radix;
  }
}

// The 16 signed sums of four vectors, entry p: bit i of p set means input i is subtracted.
FEWBIT_INLINE void tabulate(const F32 x[4], float* table, int64_t stride) {
  const F32 low[4] = {x[0] + x[1], x[1] - x[0], x[0] - x[1], F32::zero() - (x[0] + x[1])};
  const F32 high[4] = {x[2] + x[3], x[3] - x[2], x[2] - x[3], F32::zero() - (x[2] + x[3])};
  for (int p = 0; p < 16; ++p) (low[p & 3] + high[p >> 2]).store(table + p * stride);
}

// y = B^T z for the columns [c, c + width) of z [m, 2^k], B given by its sign patterns.
template <int width, class T>
static void by_patterns(const Hadamard& a, const float* z, T* y, int64_t c) {
  constexpr int vectors = width / F32::width;
  constexpr int outputs = vectors >= 8 ? 1 : 8 / vectors;  // so that 8 sums are under way
  constexpr int64_t chunk = 8;                             // bundles whose tables stay in L1
  const int64_t n = int64_t(1) << a.k, bundles = a.bundles();
  float tables[chunk * 16 * width];
  float sums[1024 * width];
  for (int64_t g0 = 0; g0 < bundles; g0 += chunk) {
    const int64_t count = bundles - g0 < chunk ? bundles - g0 : chunk;
    for (int64_t g = 0; g < count; ++g)
      for (int v = 0; v < vectors; ++v) {
        F32 x[4];
        for (int i = 0; i < 4; ++i) {
          const int64_t row =
              (g0 + g) * 4 + i;  // m = 1, 2 and multiples of 4: 2 has a short bundle
          x[i] = row < a.m ? F32::load(z + row * n + c + v * F32::width) : F32::zero();
        }
        tabulate(x, tables + g * 16 * width + v * F32::width, width);
      }
    const bool start = g0 == 0, finish = g0 + count == bundles;
    for (int64_t o = 0; o < a.m; o += outputs) {
      const int64_t here = a.m - o < outputs ? a.m - o : outputs;
      const uint8_t* pattern[outputs];
      F32 sum[outputs][vectors];
      for (int i = 0; i < outputs; ++i) {
        const int64_t row = i < here ? o + i : o;
        pattern[i] = a.patterns + row * bundles + g0;
        for (int v = 0; v < vectors; ++v)
          sum[i][v] = start ? F32::zero() : F32::load(sums + row * width + v * F32::width);
      }
      for (int64_t g = 0; g < count; ++g)
        for (int i = 0; i < outputs; ++i) {
          const float* entry = tables + (g * 16 + pattern[i][g]) * width;
          for (int v = 0; v < vectors; ++v)
            sum[i][v] = sum[i][v] + F32::load(entry + v * F32::width);
        }
      for (int i = 0; i < here; ++i)
        for (int v = 0; v < vectors; ++v) {
          if (finish)
            (sum[i][v] * F32::set(a.scale)).store(y + (o + i) * n + c + v * F32::width);
          else
            sum[i][v].store(sums + (o + i) * width + v * F32::width);
        }
    }
  }
}

// y = B^T z by multiply-adds, the outputs of one column of z [m, 2^k] across the lanes.
template <class T>
static void by_products(const Hadamard& a, const float* z, float* column, T* y) {
  const int64_t n = int64_t(1) << a.k, m = a.m;
  constexpr int across = 4;
  for (int64_t c = 0; c < n; ++c) {
    int64_t o = 0;
    for (; o + across * F32::width <= m; o += across * F32::width) {
      F32 sum[across];
      for (int v = 0; v < across; ++v) sum[v] = F32::zero();
      for (int64_t i = 0; i < m; ++i) {
        const F32 x = F32::set(z[i * n + c]);
        for (int v = 0; v < across; ++v)
          sum[v] = fma(x, F32::load(a.base + i * m + o + v * F32::width), sum[v]);
      }
      for (int v = 0; v < across; ++v) sum[v].store(column + o + v * F32::width);
    }
    for (; o + F32::width <= m; o += F32::width) {
      F32 sum = F32::zero();
      for (int64_t i = 0; i < m; ++i)
        sum = fma(F32::set(z[i * n + c]), F32::load(a.base + i * m + o), sum);
      sum.store(column + o);
    }
    for (; o < m; ++o) {
      float sum = 0.0f;
      for (int64_t i = 0; i < m; ++i) sum = __builtin_fmaf(z[i * n + c], a.base[i * m + o], sum);
      column[o] = sum;
    }
    for (int64_t i = 0; i < m; ++i) from_float(column[i] * a.scale, y + i * n + c);
  }
}

template <class T>
static void rows(const Hadamard& a, int64_t begin, int64_t end) {
  alignas(64) float z[Hadamard::max_width];
  alignas(64) float column[Hadamard::max_width];
  const int64_t n = int64_t(1) << a.k, width = a.m << a.k;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * width;
    T* y = static_cast<T*>(a.y) + r * width;
    if (n < Hadamard::lanes) {  // butterflies one number at a time, then B
      for (int64_t i = 0; i < width; ++i)
        z[i] = a.signs ? to_float(x[i]) * a.signs[i] : to_float(x[i]);
      for (int64_t half = 1; half < n; half *= 2)
        for (int64_t i = 0; i < width; ++i)
          if (!(i & half)) {
            const float p = z[i], q = z[i + half];
            z[i] = p + q;
            z[i + half] = p - q;
          }
      if (a.base)
        by_products(a, z, column, y);
      else
        for (int64_t i = 0; i < width; ++i) from_float(z[i] * a.scale, y + i);
      continue;
    }
    if (!a.base && !a.patterns) {
      sylvester(x, z, y, a.k, a.signs, a.scale);
      continue;
    }
    for (int64_t i = 0; i < a.m; ++i)
      sylvester(x + i * n, z + i * n, z + i * n, a.k, a.signs ? a.signs + i * n : a.signs, 1.0f);
    if (a.base)
      by_products(a, z, column, y);
    else if (n >= 32)
      for (int64_t c = 0; c < n; c += 32) by_patterns<32>(a, z, y, c);
    else
      by_patterns<16>(a, z, y, 0);
  }
}

void kernel(const Hadamard& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto* t) { rows<element<decltype(t)>>(a, begin, end); });
}

}  // namespace fewbit::cpu::FEWBIT_ISA
