#include "fewbit/quantize_per_token.h"

#include "per_token.h"

namespace fewbit::cpu::FEWBIT_ISA {

// A row's 4-bit codes, eight to a word.
template <class T>
static void words_of_token(const T* x, int64_t n, TokenStep step, bool fitted, TokenGrid grid,
                           uint32_t* words) {
  constexpr int64_t part = 256;
  alignas(64) int8_t q[part];
  for (int64_t k = 0; k < n; k += part) {
    const int64_t count = n - k < part ? n - k : part;
    quantize_token(x + k, nullptr, count, n, step, fitted, grid, q);
    for (int64_t i = 0; i < count; i += 8) {
      uint32_t four[2];
      __builtin_memcpy(four, q + i, 8);
      words[(k + i) / 8] = word_of_fours(four[0], four[1]);
    }
  }
}

template <class T>
static void rows(const QuantizePerToken& a, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(a.x) + m * a.columns;
    TokenStep step = fit_token(x, a.skip, a.columns, a.grid);
    const bool fitted = !(a.fixed_scale && step.s == step.s);
    if (!fitted) step = {*a.fixed_scale, a.fixed_zero ? float(*a.fixed_zero) : 0.0f};
    if (a.words)
      words_of_token(x, a.columns, step, fitted, a.grid, a.words + m * (a.columns / 8));
    else
      put_pieces<int8_t>(a.columns, a.past, a.q + m * a.columns,
                         [&](int64_t k, int64_t count, int8_t* to) {
                           quantize_token(x + k, a.skip ? a.skip + k : nullptr, count, a.columns,
                                          step, fitted, a.grid, to);
                         });
    a.scale[m] = step.s;
    a.zero_point[m] = int32_t(step.z);
  }
}

void kernel(const QuantizePerToken& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto* t) { rows<element<decltype(t)>>(a, begin, end); });
  stream_end();
}

}  // namespace fewbit::cpu::FEWBIT_ISA
