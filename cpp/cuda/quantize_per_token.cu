#include "fewbit/quantize_per_token.h"
#include "tokens.h"

namespace fewbit::cuda {

template <class T, int V>
__global__ void quantize_per_token(QuantizePerToken a) {
  const int64_t m = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + m * a.columns;
  // As many as are asked for, in accesses of V.
  const auto value = [&](int64_t k, auto& v) {
    constexpr int n = int(sizeof(v) / sizeof(v[0]));
#pragma unroll
    for (int i = 0; i < n; i += V) {
      const Vector<T, V> in = load<V>(x + k + i);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        v[i + j] = to_float(in.v[j]);
        if (a.skip && a.skip[k + i + j]) v[i + j] *= 0.0f;  // an infinity still shows
      }
    }
  };
  TokenStep step = fit_row<V>(a.columns, a.grid, value);
  if (a.fixed_scale && step.s == step.s)
    step = {*a.fixed_scale, a.fixed_zero ? float(*a.fixed_zero) : 0.0f};
  if (a.words)
    quantize_row_to_words(a.columns, a.grid, step, a.words + m * (a.columns / 8), value);
  else
    quantize_row<V>(a.columns, a.grid, step, a.q + m * a.columns, value);
  if (threadIdx.x == 0) {
    a.scale[m] = step.s;
    a.zero_point[m] = int32_t(step.z);
  }
}

const char* launch(const QuantizePerToken& a, Place place) {
  const dim3 grid = unsigned(a.m);
  return with_type(a.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    constexpr int v = 16 / sizeof(T);
    if (wide<T>(a.columns, v, a.x))
      return start(&quantize_per_token<T, v>, grid, threads_for(a.columns / v), 0, place, a);
    return start(&quantize_per_token<T, 1>, grid, threads_for(a.columns), 0, place, a);
  });
}

}  // namespace fewbit::cuda
