#include "fewbit/dequantize.h"
#include "groups.h"

namespace fewbit::cuda {

template <class T, int V>
__global__ void __launch_bounds__(group_threads, 1) dequantize(Groups<Dequantize> g) {
  const Dequantize& a = g.a;
  const Team t = team_of(g);
  if (t.index < 0) return;
  // 2^23 + q, whose last bit is worth 1, less 2^23 + z.
  const float s = a.scale[t.index], z = 0x1p23f + float(a.zero_point[t.index]);
  t.each<V>(0, [&](int64_t i) {
    const Vector<uint8_t, V> q = load<V>(a.q + t.start + i);
    Vector<T, V> w;
#pragma unroll
    for (int j = 0; j < V; ++j) from_float((float_of(0x4B000000u | q.v[j]) - z) * s, &w.v[j]);
    store(static_cast<T*>(a.out) + t.start + i, w);
  });
}

const char* launch(const Dequantize& a, Place place) {
  if (a.rows == 0 || a.columns == 0) return nullptr;
  return with_type(a.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    // Codes are V bytes: aligned as far as the output is, relative to their own start.
    const bool whole = wide<T>(a.columns, a.group_size, a.out) &&
                       reinterpret_cast<uintptr_t>(a.q) % in_access<T> == 0;
    return start_groups<T>(&dequantize<T, in_access<T>>, &dequantize<T, 1>, whole, a, place);
  });
}

}  // namespace fewbit::cuda
