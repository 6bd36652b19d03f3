#include "fewbit/pseudo_quantize.h"

#include "grid.h"

namespace fewbit::cpu::FEWBIT_ISA {

template <class T>
static void rows(const PseudoQuantize& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* row = static_cast<const T*>(a.w) + r * a.columns;
    T* out = static_cast<T*>(a.out) + r * a.columns;  // may be row
    fitted_groups(row, a.columns, a.group_size, a.grid,
                  [&](int64_t, int64_t start, int64_t n, const Step& g, bool) {
                    const T* w = row + start;
                    const StepLanes steps(g);
                    put_pieces<T>(n, a.stream, out + start, [&](int64_t k, int64_t c, T* to) {
                      int64_t i = 0;
                      for (; i + F32::width <= c; i += F32::width) {
                        ask_ahead(w + k + i);
                        ((code(F32::load(w + k + i), steps) - steps.z) * steps.s).store(to + i);
                      }
                      for (; i < c; ++i)
                        from_float((code(to_float(w[k + i]), g) - g.z) * g.s, to + i);
                    });
                  });
  }
}

void kernel(const PseudoQuantize& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto* t) { rows<element<decltype(t)>>(a, begin, end); });
  stream_end();
}

}  // namespace fewbit::cpu::FEWBIT_ISA
