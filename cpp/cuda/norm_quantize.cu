#include "fewbit/norm_quantize.h"
#include "tokens.h"

namespace fewbit::cuda {

// Sums: every thread over its columns in order, then lanes, then warps.
template <class T, int V, int access, int held>
__global__ void __launch_bounds__(row_threads, 1) norm_quantize(NormQuantize a) {
  const int64_t m = blockIdx.x, n = a.columns;
  const T* in = static_cast<const T*>(a.x) + m * n;
  const auto value = [=](int64_t k, float (&v)[V]) { load_floats<access>(in + k, v); };
  Row<V, held, decltype(value)> x(n, value);
  const auto mean_of = [&](auto& row, const auto& f) {
    float total = 0.0f;
    row.each([&](int64_t, const float (&v)[V]) {
#pragma unroll
      for (int j = 0; j < V; ++j) total += f(v[j]);
    });
    return reduce_block(total, Sum()) / float(n);
  };
  const bool centred = !a.rms;
  const float mean = centred ? mean_of(x, [](float v) { return v; }) : 0.0f;
  auto d = x.then([=](int64_t, float (&v)[V]) {
    if (!centred) return;
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] -= mean;
  });
  const float r = 1.0f / sqrtf(mean_of(d, [](float v) { return v * v; }) + a.eps);
  const float *weight = a.weight, *bias = a.bias;
  constexpr int floats = access > 1 ? 4 : 1;
  auto y = d.then([=](int64_t k, float (&v)[V]) {
    float by[V];
    load_floats<floats>(weight + k, by);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = v[j] * r * by[j];
    if (bias == nullptr) return;
    load_floats<floats>(bias + k, by);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] += by[j];
  });
  const TokenGrid grid{a.symmetric};
  const TokenStep step = y.fit(grid);
  y.quantize(Coder(step, grid, true), a.q + m * n, nullptr);
  if (threadIdx.x == 0) {
    a.scale[m] = step.s;
    a.zero_point[m] = int32_t(step.z);
  }
}

const char* launch(const NormQuantize& a, Place place) {
  const bool aligned = at_16(a.x) && at_16(a.weight) && at_16(a.bias);
  return with_type(a.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    return with_row<T>(a.columns, aligned, [&](auto v, auto access, auto held) {
      constexpr int V = decltype(v)::value, A = decltype(access)::value, H = decltype(held)::value;
      return start(&norm_quantize<T, V, A, H>, dim3(unsigned(a.m)), row_block(a.columns, V), 0,
                   place, a);
    });
  });
}

}  // namespace fewbit::cuda
