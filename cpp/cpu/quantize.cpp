#include "fewbit/quantize.h"

#include "grid.h"

namespace fewbit::cpu::FEWBIT_ISA {

template <class T>
static void rows(const Quantize& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t group = 0; group < a.groups; ++group) {
      const int64_t start = group * a.group_size;
      const int64_t n = start + a.group_size <= a.columns ? a.group_size : a.columns - start;
      const T* w = static_cast<const T*>(a.w) + r * a.columns + start;
      uint8_t* q = a.q + r * a.columns + start;
      const Step g = fit(w, n, a.grid);
      a.scale[r * a.groups + group] = g.s;
      a.zero_point[r * a.groups + group] = uint8_t(g.z);
      const StepLanes steps(g);
      int64_t i = 0;
      for (; i + F32::width <= n; i += F32::width) code(F32::load(w + i), steps).store(q + i);
      for (; i < n; ++i) q[i] = uint8_t(code(to_float(w[i]), g));
    }
  }
}

void kernel(const Quantize& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto* t) { rows<element<decltype(t)>>(a, begin, end); });
}

}  // namespace fewbit::cpu::FEWBIT_ISA
