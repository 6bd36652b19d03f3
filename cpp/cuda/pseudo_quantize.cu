#include "fewbit/pseudo_quantize.h"
#include "groups.h"

namespace fewbit::cuda {

template <class T, int V>
__global__ void __launch_bounds__(group_threads, 1) pseudo_quantize(Groups<PseudoQuantize> g) {
  const PseudoQuantize& a = g.a;
  const Team t = team_of(g);
  T* out = static_cast<T*>(a.out) + t.start;
  quantize_group<V>(static_cast<const T*>(a.w) + t.start, t, a.grid,
                    [&](int64_t i, const float (&w)[V], const Coder& coder) {
                      float code[V];
                      coder.shifted_codes(w, code);
                      store(out + i, coder.template values<T>(code));
                    });
}

const char* launch(const PseudoQuantize& a, Place place) {
  if (a.rows == 0 || a.columns == 0) return nullptr;
  return with_type(a.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    const bool whole =
        wide<T>(a.columns, a.group_size, a.w) && wide<T>(a.columns, a.group_size, a.out);
    return start_groups<T>(&pseudo_quantize<T, in_access<T>>, &pseudo_quantize<T, 1>, whole, a,
                           place);
  });
}

}  // namespace fewbit::cuda
