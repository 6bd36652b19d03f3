#include "device.h"
#include "fewbit/dequantize.h"

namespace fewbit::cuda {

constexpr int dequantize_threads = 256;

template <class T, int V>
__global__ void dequantize(Dequantize a) {
  const int64_t steps = a.columns / V, count = a.rows * steps;
  const int64_t at = int64_t(blockIdx.x) * dequantize_threads + threadIdx.x;
  if (at >= count) return;
  const int64_t row = at / steps, k = at % steps * V;
  const int64_t group = row * a.groups + k / a.group_size;
  const float s = a.scale[group], z = float(a.zero_point[group]);
  const Vector<uint8_t, V> q = load<V>(a.q + row * a.columns + k);
  Vector<T, V> w;
#pragma unroll
  for (int j = 0; j < V; ++j) from_float((float(q.v[j]) - z) * s, &w.v[j]);
  store(static_cast<T*>(a.out) + row * a.columns + k, w);
}

const char* launch(const Dequantize& a, Place place) {
  return with_type(a.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    const auto run = [&](auto* kernel, int64_t v) {
      const int64_t count = a.rows * (a.columns / v);
      const int64_t blocks = (count + dequantize_threads - 1) / dequantize_threads;
      return start(kernel, unsigned(blocks), dequantize_threads, 0, place, a);
    };
    constexpr int v = 16 / sizeof(T);
    // Codes are V bytes: aligned as far as the output is, relative to their own start.
    if (wide<T>(a.columns, a.group_size, a.out) && reinterpret_cast<uintptr_t>(a.q) % v == 0)
      return run(&dequantize<T, v>, v);
    return run(&dequantize<T, 1>, 1);
  });
}

}  // namespace fewbit::cuda
