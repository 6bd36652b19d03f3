// One row of activations to int8 or int4; equation in fewbit/quantize_per_token.h.
#pragma once
#include "fewbit/quantize_per_token.h"
#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

// Range of a row that always holds 0; `finite` is false where it holds a NaN or an infinity.
template <class T>
FEWBIT_INLINE TokenStep fit_token(const T* x, const uint8_t* skip, int64_t n, TokenGrid grid) {
  constexpr int chains = 2;  // hide the latency
  F32 lo[chains], hi[chains], poison[chains];
  for (int c = 0; c < chains; ++c) lo[c] = hi[c] = poison[c] = F32::zero();
  const auto add = [&](int64_t i, int c) {
    F32 v = F32::load(x + i);
    ask_ahead(x + i);
    // Codes 0 or 1 as a factor: marked columns leave the range alone, unless not finite.
    if (skip) v = v * (F32::set(1.0f) - F32::load(skip + i));
    lo[c] = min(v, lo[c]);
    hi[c] = max(v, hi[c]);
    poison[c] = fma(v, F32::zero(), poison[c]);
  };
  int64_t i = 0;
  for (; i + chains * F32::width <= n; i += chains * F32::width)
    for (int c = 0; c < chains; ++c) add(i + c * F32::width, c);
  for (; i + F32::width <= n; i += F32::width) add(i, 0);
  float low = reduce_min(min(lo[0], lo[1])), high = reduce_max(max(hi[0], hi[1])), bad = 0.0f;
  for (int j = 0; j < F32::width; ++j) bad += lane(poison[0] + poison[1], j);
  for (; i < n; ++i) {
    const float v = skip && skip[i] ? to_float(x[i]) * 0.0f : to_float(x[i]);
    low = v < low ? v : low;
    high = v > high ? v : high;
    bad += v * 0.0f;
  }
  return token_step(low, high, bad == 0.0f, grid);
}

// The codes of n columns, in pieces: one that holds a middle of two codes is divided by s.
template <class T>
FEWBIT_INLINE void quantize_token(const T* x, const uint8_t* skip, int64_t n, TokenStep step,
                                  TokenGrid grid, int8_t* q) {
  constexpr int64_t piece = 256;
  const float reach = step.z == 0.0f ? grid.top() + 2.0f : 256.0f;
  const F32 s = F32::set(step.s), z = F32::set(step.z), inverse = F32::set(inverse_of(step.s));
  const F32 low = F32::set(grid.least()), high = F32::set(grid.top());
  const int64_t whole = n / F32::width * F32::width;
  int64_t i = 0;
  for (; i < whole; i += piece) {
    const int64_t count = whole - i < piece ? whole - i : piece;
    const auto load = [&](int64_t k) {
      const F32 v = F32::load(x + i + k);
      ask_ahead(x + n + i + k);  // the next row: its first 8 KiB were asked for
      return skip ? v * (F32::set(1.0f) - F32::load(skip + i + k)) : v;
    };
    uint8_t* to = reinterpret_cast<uint8_t*>(q + i);
    if (F32::width == 1 || !codes_by_inverse(count, load, inverse, z, low, high, reach, to))
      for (int64_t k = 0; k < count; k += F32::width)
        min(max(round(load(k) / s) + z, low), high).store(q + i + k);
  }
  for (i = whole; i < n; ++i) {
    const float v = skip && skip[i] ? to_float(x[i]) * 0.0f : to_float(x[i]);
    q[i] = token_code(v, step, grid);
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
