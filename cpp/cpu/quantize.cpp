#include "fewbit/quantize.h"

#include "grid.h"

namespace fewbit::cpu::FEWBIT_ISA {

template <class T>
static void rows(const Quantize& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r)
    fitted_groups(static_cast<const T*>(a.w) + r * a.columns, a.columns, a.group_size, a.grid,
                  [&](int64_t group, int64_t start, int64_t n, const Step& g, bool fit) {
                    const T* w = static_cast<const T*>(a.w) + r * a.columns + start;
                    uint8_t* q = a.q + r * a.columns + start;
                    a.scale[r * a.groups + group] = g.s;
                    a.zero_point[r * a.groups + group] = uint8_t(g.z);
                    const StepLanes steps(g);
                    put_pieces<uint8_t>(n, a.stream, q, [&](int64_t k, int64_t c, uint8_t* to) {
                      codes(w + k, c, g, fit, steps, to);
                    });
                  });
}

void kernel(const Quantize& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto* t) { rows<element<decltype(t)>>(a, begin, end); });
  stream_end();
}

}  // namespace fewbit::cpu::FEWBIT_ISA
