#include "fewbit/pseudo_quantize.h"
#include "groups.h"

namespace fewbit::cuda {

template <class T, int V>
__global__ void pseudo_quantize(PseudoQuantize a) {
  const int lanes = team_lanes(a.group_size, V);
  const Team t = team_of(a.rows, a.columns, a.group_size, lanes);
  T* out = static_cast<T*>(a.out) + t.start;
  quantize_group<V>(static_cast<const T*>(a.w) + t.start, t.n, lanes, t.lane, a.grid,
                    [&](int64_t i, const float (&w)[V], const Step& g) {
                      Vector<T, V> y;
#pragma unroll
                      for (int j = 0; j < V; ++j) from_float((code(w[j], g) - g.z) * g.s, &y.v[j]);
                      store(out + i, y);
                    });
}

const char* launch(const PseudoQuantize& a, Place place) {
  if (a.rows == 0 || a.columns == 0) return nullptr;
  return with_type(a.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    const auto run = [&](auto* kernel, int v) {
      const unsigned blocks =
          team_blocks(a.rows, a.columns, a.group_size, team_lanes(a.group_size, v));
      return start(kernel, blocks, group_threads, 0, place, a);
    };
    constexpr int v = 16 / sizeof(T);
    if (wide<T>(a.columns, a.group_size, a.w) && wide<T>(a.columns, a.group_size, a.out))
      return run(&pseudo_quantize<T, v>, v);
    return run(&pseudo_quantize<T, 1>, 1);
  });
}

}  // namespace fewbit::cuda
