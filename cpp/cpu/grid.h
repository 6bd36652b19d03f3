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

template <class T>
FEWBIT_INLINE Step fit(const T* w, int64_t n, const Grid& grid) {
  F32 least[chains], most[chains];
  for (int c = 0; c < chains; ++c) least[c] = most[c] = F32::zero();
  int64_t i = in_chains(n, [&](int64_t k, int c) {
    const F32 v = F32::load(w + k);
    ask_ahead(w + k);
    least[c] = min(v, least[c]);
    most[c] = max(v, most[c]);
  });
  float lo = reduce_min(min(least[0], least[1])), hi = reduce_max(max(most[0], most[1]));
  for (; i < n; ++i) {
    const float v = to_float(w[i]);
    lo = v < lo ? v : lo;
    hi = v > hi ? v : hi;
  }
  return make_step(lo, hi, grid);
}

// Calls use(group, start, columns, step) for every group of a row. Some groups are fitted before
// they are used: a fit is a chain of dependent instructions, which one of the next can overlap.
template <class T, class F>
FEWBIT_INLINE void fitted_groups(const T* row, int64_t columns, int64_t group_size,
                                 const Grid& grid, const F& use) {
  constexpr int64_t most = 8, near = 4096;  // groups, and their columns in all, which stay in L1
  const int64_t fit_in = near / group_size;
  const int64_t batch = fit_in < 1 ? 1 : fit_in > most ? most : fit_in;
  const auto length = [&](int64_t start) {
    return start + group_size <= columns ? group_size : columns - start;
  };
  for (int64_t group = 0, first = 0; first < columns; group += batch) {
    Step step[most];
    int64_t start = first;
    for (int64_t i = 0; i < batch && start < columns; ++i, start += group_size)
      step[i] = fit(row + start, length(start), grid);
    for (int64_t i = 0; i < batch && first < columns; ++i, first += group_size)
      use(group + i, first, length(first), step[i]);
  }
}

FEWBIT_INLINE F32 code(F32 w, const StepLanes& g) {
  return min(max(round_quotient(w, g.s, g.inverse) + g.z, F32::zero()), g.qmax);
}

// The codes of n weights of one group.
template <class T>
FEWBIT_INLINE void codes(const T* w, int64_t n, const Step& g, const StepLanes& lanes, uint8_t* q) {
  const int64_t whole = n / F32::width * F32::width;
  const auto load = [&](int64_t i) { return F32::load(w + i); };
  if (F32::width == 1 || !codes_by_inverse(whole, load, lanes.inverse, lanes.z, F32::zero(),
                                           lanes.qmax, g.qmax + 1.0f, q))
    for (int64_t i = 0; i < whole; i += F32::width) code(load(i), lanes).store(q + i);
  for (int64_t i = whole; i < n; ++i) q[i] = uint8_t(code(to_float(w[i]), g));
}

}  // namespace fewbit::cpu::FEWBIT_ISA
