// Fitting and applying the grid of one group; equation and rounding in fewbit/grid.h.
#pragma once
#include "fewbit/grid.h"
#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

// A Step in lanes.
struct StepLanes {
  F32 s, z, qmax, inverse;
  FEWBIT_INLINE_MEMBER explicit StepLanes(const Step& g)
      : s(F32::set(g.s)),
        z(F32::set(g.z)),
        qmax(F32::set(g.qmax)),
        inverse(F32::set(inverse_of(g.s))) {}
};

// The steps of a vector of ranges at once, the bits of make_step; false where one of them is not in
// the middle of what a half can hold, as almost all are, and make_step has more to look at.
FEWBIT_INLINE bool usual_steps(F32 lo, F32 hi, const Grid& grid, float* s, float* z) {
  const F32 qmax = F32::set(float((1 << grid.bits) - 1));
  if (grid.symmetric) {
    hi = max(F32::zero() - lo, hi);
    lo = F32::zero() - hi;
  }
  F32 step = (hi - lo) / qmax;
  if (!all_less(F32::set(0x1p-14f), step) || !all_less(step, F32::set(65504.0f))) return false;
  with_type(grid.scale_dtype, [&](auto* t) {
    element<decltype(t)> stored[F32::width];
    step.store(stored);
    step = F32::load(stored);
  });
  step.store(s);
  (grid.symmetric ? F32::set(float(1 << (grid.bits - 1)))
                  : min(max(round((F32::zero() - lo) / step), F32::zero()), qmax))
      .store(z);
  return true;
}

// make_step of n ranges, n a multiple of F32::width.
FEWBIT_INLINE void make_steps(const float* lo, const float* hi, int64_t n, const Grid& grid,
                              float* s, float* z) {
  for (int64_t i = 0; i < n; i += F32::width)
    if (F32::width == 1 || !usual_steps(F32::load(lo + i), F32::load(hi + i), grid, s + i, z + i))
      for (int64_t j = i; j < i + F32::width; ++j) {
        const Step g = make_step(lo[j], hi[j], grid);
        s[j] = g.s;
        z[j] = g.z;
      }
}

// The range lo .. hi of n numbers, with 0 in it: load(i) gives a vector of them, one(i) a single
// one.
template <class Load, class One>
FEWBIT_INLINE void range_of(int64_t n, const Load& load, const One& one, float& lo, float& hi) {
  F32 least[chains], most[chains];
  for (int c = 0; c < chains; ++c) least[c] = most[c] = F32::zero();
  int64_t i = in_chains(n, [&](int64_t k, int c) {
    const F32 v = load(k);
    least[c] = min(v, least[c]);
    most[c] = max(v, most[c]);
  });
  lo = reduce_min(min(least[0], least[1]));
  hi = reduce_max(max(most[0], most[1]));
  for (; i < n; ++i) {
    const float v = one(i);
    lo = v < lo ? v : lo;
    hi = v > hi ? v : hi;
  }
}

// Whether all numbers of n ranges, a multiple of F32::width, get codes 0 .. qmax without a clamp:
// their ends do, and rounding keeps order. Few asymmetric ranges want a code more: both ends must
// be rounded away from each other, being middles of two codes or s having been rounded down.
FEWBIT_INLINE bool codes_fit(const float* lo, const float* hi, const float* s, const float* z,
                             int64_t n, const Grid& grid) {
  const F32 above = F32::set(float(1 << grid.bits) - 0.5f), below = F32::set(-0.5f);
  bool all = true;
  for (int64_t i = 0; i < n; i += F32::width) {
    const F32 step = F32::load(s + i), zero = F32::load(z + i);
    all = all && all_less(round(F32::load(hi + i) / step) + zero, above) &&
          all_less(below, round(F32::load(lo + i) / step) + zero);
  }
  return all;
}

// Calls use(group, start, columns, step, fit) for every group of a row; what codes_fit says is true
// of the group. Some groups are fitted before they are used: a fit is a chain of dependent
// instructions, which one of the next can overlap, and their steps are made together. What lies
// ahead is to be asked for where groups are used: that takes longest, and the caches hold them.
template <class T, class F>
FEWBIT_INLINE void fitted_groups(const T* row, int64_t columns, int64_t group_size,
                                 const Grid& grid, const F& use) {
  constexpr int64_t most = 16, near = 4096;  // groups, and their columns in all, which stay in L1
  const int64_t fit_in = near / group_size;
  const int64_t batch = fit_in < 1 ? 1 : fit_in > most ? most : fit_in;
  const auto length = [&](int64_t start) {
    return start + group_size <= columns ? group_size : columns - start;
  };
  float lo[most], hi[most], s[most], z[most];
  for (int64_t group = 0, first = 0; first < columns; group += batch) {
    int64_t count = 0;
    for (int64_t start = first; count < batch && start < columns; ++count, start += group_size) {
      const T* w = row + start;
      const auto load = [&](int64_t i) { return F32::load(w + i); };
      const auto one = [&](int64_t i) { return to_float(w[i]); };
      range_of(length(start), load, one, lo[count], hi[count]);
    }
    const int64_t whole = (count + F32::width - 1) / F32::width * F32::width;
    for (int64_t i = count; i < whole; ++i) {  // an ordinary range, which nobody uses
      lo[i] = 0.0f;
      hi[i] = 1.0f;
    }
    make_steps(lo, hi, whole, grid, s, z);
    const bool fit = codes_fit(lo, hi, s, z, whole, grid);
    for (int64_t i = 0; i < count; ++i, first += group_size)
      use(group + i, first, length(first), Step{s[i], z[i], float((1 << grid.bits) - 1)}, fit);
  }
}

FEWBIT_INLINE F32 code(F32 w, const StepLanes& g) {
  return min(max(round_quotient(w, g.s, g.inverse) + g.z, F32::zero()), g.qmax);
}

// The codes of n weights of one group, in small pieces: the end of a symmetric range is a middle of
// two codes, unless s has been rounded. `fit`: as codes_fit says.
template <class T>
FEWBIT_INLINE void codes(const T* w, int64_t n, const Step& g, bool fit, const StepLanes& lanes,
                         uint8_t* q) {
  const int64_t whole = n / F32::width * F32::width;
  const auto load = [&](int64_t i) {
    ask_ahead(w + i);
    return F32::load(w + i);
  };
  const F32 zero = F32::zero();
  if (fit)
    codes_of<64, false>(whole, load, lanes.s, lanes.inverse, lanes.z, zero, lanes.qmax,
                        g.qmax + 1.0f, q);
  else
    codes_of<64>(whole, load, lanes.s, lanes.inverse, lanes.z, zero, lanes.qmax, g.qmax + 1.0f, q);
  for (int64_t i = whole; i < n; ++i) q[i] = uint8_t(code(to_float(w[i]), g));
}

}  // namespace fewbit::cpu::FEWBIT_ISA
