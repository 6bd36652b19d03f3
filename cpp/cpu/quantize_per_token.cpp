#include "fewbit/quantize_per_token.h"

#include "per_token.h"

namespace fewbit::cpu::FEWBIT_ISA {

template <class T>
static void rows(const QuantizePerToken& a, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(a.x) + m * a.columns;
    TokenStep step = fit_token(x, a.skip, a.columns, a.symmetric);
    if (a.fixed_scale && step.s == step.s)
      step = {*a.fixed_scale, a.fixed_zero ? float(*a.fixed_zero) : 0.0f};
    quantize_token(x, a.skip, a.columns, step, a.symmetric, a.q + m * a.columns);
    a.scale[m] = step.s;
    a.zero_point[m] = int32_t(step.z);
  }
}

void kernel(const QuantizePerToken& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto* t) { rows<element<decltype(t)>>(a, begin, end); });
}

}  // namespace fewbit::cpu::FEWBIT_ISA
