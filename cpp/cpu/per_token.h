// One row of activations to int8 or int4; equation in fewbit/quantize_per_token.h.
#pragma once
#include "fewbit/quantize_per_token.h"
#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

// Column i of a row, or a vector of them: marked ones count as 0, unless not finite.
template <class T>
FEWBIT_INLINE F32 columns_of(const T* x, const uint8_t* skip, int64_t i) {
  const F32 v = F32::load(x + i);
  return skip ? v * (F32::set(1.0f) - F32::load(skip + i)) : v;
}
template <class T>
FEWBIT_INLINE float column_of(const T* x, const uint8_t* skip, int64_t i) {
  return skip && skip[i] ? to_float(x[i]) * 0.0f : to_float(x[i]);
}

template <class T>
FEWBIT_INLINE TokenStep fit_symmetric(const T* x, const uint8_t* skip, int64_t n, TokenGrid grid) {
  F32 top[chains];
  for (int c = 0; c < chains; ++c) top[c] = F32::zero();
  int64_t i = in_chains(n, [&](int64_t k, int c) {
    ask_ahead(x + k);
    top[c] = max_abs(top[c], columns_of(x, skip, k));
  });
  uint32_t most = 0;
  for (int j = 0; j < F32::width; ++j) {
    const uint32_t bits = bits_of(lane(max_abs(top[0], top[1]), j));
    most = bits > most ? bits : most;
  }
  for (; i < n; ++i) {
    const uint32_t bits = bits_of(abs_of(column_of(x, skip, i)));
    most = bits > most ? bits : most;
  }
  return token_step(0.0f, float_of(most), most < bits_of(__builtin_inff()), grid);
}

template <class T>
FEWBIT_INLINE TokenStep fit_range(const T* x, const uint8_t* skip, int64_t n, TokenGrid grid) {
  F32 lo[chains], hi[chains], poison[chains];
  for (int c = 0; c < chains; ++c) lo[c] = hi[c] = poison[c] = F32::zero();
  int64_t i = in_chains(n, [&](int64_t k, int c) {
    const F32 v = columns_of(x, skip, k);
    ask_ahead(x + k);
    lo[c] = min(v, lo[c]);
    hi[c] = max(v, hi[c]);
    poison[c] = fma(v, F32::zero(), poison[c]);
  });
  float low = reduce_min(min(lo[0], lo[1])), high = reduce_max(max(hi[0], hi[1])), bad = 0.0f;
  for (int j = 0; j < F32::width; ++j) bad += lane(poison[0] + poison[1], j);
  for (; i < n; ++i) {
    const float v = column_of(x, skip, i);
    low = v < low ? v : low;
    high = v > high ? v : high;
    bad += v * 0.0f;
  }
  return token_step(low, high, bad == 0.0f, grid);
}

template <class T>
FEWBIT_INLINE TokenStep fit_token(const T* x, const uint8_t* skip, int64_t n, TokenGrid grid) {
  return grid.symmetric ? fit_symmetric(x, skip, n, grid) : fit_range(x, skip, n, grid);
}

// The codes of n columns. The next row, `ahead` columns behind this one, is asked for on the way;
// 0: there is none.
template <bool clamped, class T>
FEWBIT_INLINE void codes_of_token(const T* x, const uint8_t* skip, int64_t n, int64_t ahead,
                                  TokenStep step, TokenGrid grid, int8_t* q) {
  const float reach = step.z == 0.0f ? grid.top() + 2.0f : 256.0f;
  const auto load = [&](int64_t i) {
    if (ahead > 0) ask_later(x + ahead + i);
    return columns_of(x, skip, i);
  };
  const int64_t whole = n / F32::width * F32::width;
  codes_of<256, clamped>(whole, load, F32::set(step.s), F32::set(inverse_of(step.s)),
                         F32::set(step.z), F32::set(grid.least()), F32::set(grid.top()), reach, q);
  for (int64_t rest = n % F32::width, i = n - rest; rest > 0; --rest, ++i)
    q[i] = token_code(column_of(x, skip, i), step, grid);
}

// `fitted`: the step is what fit_token gave.
template <class T>
FEWBIT_INLINE void quantize_token(const T* x, const uint8_t* skip, int64_t n, int64_t ahead,
                                  TokenStep step, bool fitted, TokenGrid grid, int8_t* q) {
  // A whole symmetric range needs no clamp: |x| / s is at most top, and a rounding more.
  if (fitted && grid.symmetric && !(grid.clip > 0.0f) && step.s == step.s)
    codes_of_token<false>(x, skip, n, ahead, step, grid, q);
  else
    codes_of_token<true>(x, skip, n, ahead, step, grid, q);
}

}  // namespace fewbit::cpu::FEWBIT_ISA
