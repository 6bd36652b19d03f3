#include "fewbit/scaled_error.h"

#include "grid.h"

namespace fewbit::cpu::FEWBIT_ISA {

// The step of w s over one group.
template <class T>
FEWBIT_INLINE Step fit_scaled(const T* w, const float* s, int64_t n, const Grid& grid) {
  float lo, hi;
  range_of(
      n, [&](int64_t i) { return F32::load(w + i) * F32::load(s + i); },
      [&](int64_t i) { return to_float(w[i]) * s[i]; }, lo, hi);
  return make_step(lo, hi, grid);
}

// A row stays in L1 while all scales are tried on it.
template <class T>
static void rows(const ScaledError& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r)
    for (int64_t c = 0; c < a.count; ++c)
      for (int64_t start = 0; start < a.columns; start += a.group_size) {
        const int64_t n = start + a.group_size <= a.columns ? a.group_size : a.columns - start;
        const T* w = static_cast<const T*>(a.w) + r * a.columns + start;
        const float* s = a.scale + c * a.columns + start;
        T* error = static_cast<T*>(a.error) + (c * a.rows + r) * a.columns + start;
        const Step g = fit_scaled(w, s, n, a.grid);
        const StepLanes steps(g);
        int64_t i = 0;
        for (; i + F32::width <= n; i += F32::width) {
          const F32 x = F32::load(w + i), by = F32::load(s + i);
          ((code(x * by, steps) - steps.z) * steps.s / by - x).store(error + i);
        }
        for (; i < n; ++i) {
          const float x = to_float(w[i]);
          from_float((code(x * s[i], g) - g.z) * g.s / s[i] - x, error + i);
        }
      }
}

void kernel(const ScaledError& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto* t) { rows<element<decltype(t)>>(a, begin, end); });
}

}  // namespace fewbit::cpu::FEWBIT_ISA
