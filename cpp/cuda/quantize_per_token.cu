#include "fewbit/quantize_per_token.h"
#include "tokens.h"

namespace fewbit::cuda {

template <class T, int V, int access, int held>
__global__ void __launch_bounds__(row_threads, 1) quantize_per_token(QuantizePerToken a) {
  const int64_t m = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + m * a.columns;
  const auto value = [=](int64_t k, float (&v)[V]) {
    load_floats<access>(x + k, v);
    if (a.skip == nullptr) return;
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (a.skip[k + j]) v[j] *= 0.0f;  // an infinity still shows
  };
  Row<V, held, decltype(value)> row(a.columns, value);
  TokenStep step = row.fit(a.grid);
  const bool fitted = !(a.fixed_scale && step.s == step.s);
  if (!fitted) step = {*a.fixed_scale, a.fixed_zero ? float(*a.fixed_zero) : 0.0f};
  row.quantize(Coder(step, a.grid, fitted), a.q + m * a.columns,
               a.words ? a.words + m * (a.columns / 8) : nullptr);
  if (threadIdx.x == 0) {
    a.scale[m] = step.s;
    a.zero_point[m] = int32_t(step.z);
  }
}

const char* launch(const QuantizePerToken& a, Place place) {
  return with_type(a.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    return with_row<T>(a.columns, at_16(a.x), [&](auto v, auto access, auto held) {
      constexpr int V = decltype(v)::value, A = decltype(access)::value, H = decltype(held)::value;
      return start(&quantize_per_token<T, V, A, H>, dim3(unsigned(a.m)), row_block(a.columns, V), 0,
                   place, a);
    });
  });
}

}  // namespace fewbit::cuda
