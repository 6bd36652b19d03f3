#include "fewbit/quantize.h"
#include "groups.h"

namespace fewbit::cuda {

template <class T, int V>
__global__ void quantize(Quantize a) {
  const int lanes = team_lanes(a.group_size, V);
  const Team t = team_of(a.rows, a.columns, a.group_size, lanes);
  const Step step = quantize_group<V>(static_cast<const T*>(a.w) + t.start, t.n, lanes, t.lane,
                                      a.grid, [&](int64_t i, const float (&w)[V], const Step& g) {
                                        Vector<uint8_t, V> q;
#pragma unroll
                                        for (int j = 0; j < V; ++j) q.v[j] = uint8_t(code(w[j], g));
                                        store(a.q + t.start + i, q);
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
    const auto run = [&](auto* kernel, int v) {
      const unsigned blocks =
          team_blocks(a.rows, a.columns, a.group_size, team_lanes(a.group_size, v));
      return start(kernel, blocks, group_threads, 0, place, a);
    };
    constexpr int v = 16 / sizeof(T);
    if (wide<T>(a.columns, a.group_size, a.w)) return run(&quantize<T, v>, v);
    return run(&quantize<T, 1>, 1);
  });
}

}  // namespace fewbit::cuda
