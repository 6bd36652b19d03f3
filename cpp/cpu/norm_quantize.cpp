#include "fewbit/norm_quantize.h"

#include "per_token.h"

namespace fewbit::cpu::FEWBIT_ISA {

// sum f(i) over [0, n): eight chains of lanes, fixed order.
template <class V, class S>
FEWBIT_INLINE float sum_of(int64_t n, const V& vector, const S& scalar) {
  F32 sum[8];
  for (F32& s : sum) s = F32::zero();
  int64_t i = 0;
  for (; i + 8 * F32::width <= n; i += 8 * F32::width)
    for (int j = 0; j < 8; ++j) sum[j] = sum[j] + vector(i + j * F32::width);
  for (int j = 4; j > 0; j /= 2)
    for (int k = 0; k < j; ++k) sum[k] = sum[k] + sum[k + j];
  float total = 0.0f, rest = 0.0f;
  for (int j = 0; j < F32::width; ++j) total += lane(sum[0], j);
  for (; i < n; ++i) rest += scalar(i);
  return total + rest;
}

template <class T>
static void rows(const NormQuantize& a, int64_t begin, int64_t end) {
  const int64_t n = a.columns;
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(a.x) + m * n;
    float* y = a.y + m * n;
    const float mean = a.rms ? 0.0f
                             : sum_of(
                                   n, [&](int64_t i) { return F32::load(x + i); },
                                   [&](int64_t i) { return to_float(x[i]); }) /
                                   float(n);
    const F32 centre = F32::set(mean);
    const float square = sum_of(
                             n,
                             [&](int64_t i) {
                               const F32 v = F32::load(x + i) - centre;
                               return v * v;
                             },
                             [&](int64_t i) {
                               const float v = to_float(x[i]) - mean;
                               return v * v;
                             }) /
                         float(n);
    const float r = 1.0f / __builtin_sqrtf(square + a.eps);
    int64_t i = 0;
    for (; i + F32::width <= n; i += F32::width) {
      F32 v = (F32::load(x + i) - centre) * F32::set(r) * F32::load(a.weight + i);
      if (a.bias) v = v + F32::load(a.bias + i);
      v.store(y + i);
    }
    for (; i < n; ++i) {
      const float v = (to_float(x[i]) - mean) * r * a.weight[i];
      y[i] = a.bias ? v + a.bias[i] : v;
    }
    const TokenStep step = fit_token(y, nullptr, n, {a.symmetric});
    quantize_token(y, nullptr, n, 0, step, true, {a.symmetric}, a.q + m * n);
    a.scale[m] = step.s;
    a.zero_point[m] = int32_t(step.z);
  }
}

void kernel(const NormQuantize& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto* t) { rows<element<decltype(t)>>(a, begin, end); });
}

}  // namespace fewbit::cpu::FEWBIT_ISA
