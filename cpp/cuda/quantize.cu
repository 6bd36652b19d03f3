#include "fewbit/quantize.h"
#include "groups.h"

namespace fewbit::cuda {

template <class T, int V>
__global__ void __launch_bounds__(group_threads, 1) quantize(Groups<Quantize> g) {
  const Quantize& a = g.a;
  const Team t = team_of(g);
  const Step step = quantize_group<V>(static_cast<const T*>(a.w) + t.start, t, a.grid,
                                      [&](int64_t i, const float (&w)[V], const Coder& coder) {
                                        float code[V];
                                        coder.shifted_codes(w, code);
                                        store(a.q + t.start + i, bytes_of<uint8_t>(code));
                                      });
  if (t.lane == 0 && t.index >= 0) {
    a.scale[t.index] = step.s;
    a.zero_point[t.index] = uint8_t(step.z);
  }
}

const char* launch(const Quantize& a, Place place) {
  if (a.rows == 0 || a.columns == 0) return nullptr;
  return with_type(a.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    const bool whole = wide<T>(a.columns, a.group_size, a.w);
    return start_groups<T>(&quantize<T, in_access<T>>, &quantize<T, 1>, whole, a, place);
  });
}

}  // namespace fewbit::cuda
