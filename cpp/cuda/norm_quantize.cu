#include "fewbit/norm_quantize.h"
#include "tokens.h"

namespace fewbit::cuda {

// The row is read again from cache for the variance, the range and the codes. Sums: every thread
// over its columns in order, then lanes, then warps.
template <class T, int V>
__global__ void norm_quantize(NormQuantize a) {
  const int64_t m = blockIdx.x, n = a.columns;
  const T* x = static_cast<const T*>(a.x) + m * n;
  const auto sum = [&](const auto& f) {
    float total = 0.0f;
    for (int64_t k = int64_t(threadIdx.x) * V; k < n; k += int64_t(blockDim.x) * V) {
      const Vector<T, V> in = load<V>(x + k);
#pragma unroll
      for (int j = 0; j < V; ++j) total += f(to_float(in.v[j]));
    }
    return reduce_block(total, Sum());
  };
  const float mean = a.rms ? 0.0f : sum([](float v) { return v; }) / float(n);
  const float square = sum([&](float v) { return (v - mean) * (v - mean); }) / float(n);
  const float r = 1.0f / sqrtf(square + a.eps);
  const auto value = [&](int64_t k, float (&v)[V]) {
    const Vector<T, V> in = load<V>(x + k);
    const Vector<float, V> weight = load<V>(a.weight + k);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      v[j] = (to_float(in.v[j]) - mean) * r * weight.v[j];
      if (a.bias) v[j] += a.bias[k + j];
    }
  };
  const TokenStep step = fit_row<V>(n, {a.symmetric}, value);
  quantize_row<V>(n, {a.symmetric}, step, a.q + m * n, value);
  if (threadIdx.x == 0) {
    a.scale[m] = step.s;
    a.zero_point[m] = int32_t(step.z);
  }
}

const char* launch(const NormQuantize& a, Place place) {
  const dim3 grid = unsigned(a.m);
  return with_type(a.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    constexpr int v = 4;  // float weights of four columns are one access
    const bool aligned = wide<float>(a.columns, v, a.weight) &&
                         reinterpret_cast<uintptr_t>(a.x) % 16 == 0 &&
                         reinterpret_cast<uintptr_t>(a.bias) % 16 == 0;
    if (aligned) return start(&norm_quantize<T, v>, grid, threads_for(a.columns / v), 0, place, a);
    return start(&norm_quantize<T, 1>, grid, threads_for(a.columns), 0, place, a);
  });
}

}  // namespace fewbit::cuda
