#include "fewbit/act_stats.h"

#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

// Tokens whose values of one channel are added before its sums are stored again.
constexpr int64_t depth = 8;

template <class T>
static void channels(const ActStats& a, int64_t first, int64_t last) {
  const T* x = static_cast<const T*>(a.x);
  for (int64_t t0 = 0; t0 < a.tokens; t0 += depth) {
    const int64_t t1 = t0 + depth < a.tokens ? t0 + depth : a.tokens;
    int64_t i = first;
    for (; i + F32::width <= last; i += F32::width) {
      constexpr int halves = F32::width / F64::width;
      F64 sum[halves];
      for (int h = 0; h < halves; ++h) sum[h] = F64::load(a.sum_abs + i + h * F64::width);
      F32 top = F32::load(a.max_abs + i);
      for (int64_t t = t0; t < t1; ++t) {
        const F32 v = abs(F32::load(x + t * a.channels + i));
        ask_later(x + (t + depth) * a.channels + i);  // rows may be pages apart
        sum[0] = sum[0] + widened<0>(v);
        if constexpr (halves > 1) sum[1] = sum[1] + widened<1>(v);
        top = max(top, v);
      }
      for (int h = 0; h < halves; ++h) sum[h].store(a.sum_abs + i + h * F64::width);
      top.store(a.max_abs + i);
    }
    for (; i < last; ++i)
      for (int64_t t = t0; t < t1; ++t) {
        const float v = abs_of(to_float(x[t * a.channels + i]));
        a.sum_abs[i] += double(v);
        a.max_abs[i] = a.max_abs[i] > v ? a.max_abs[i] : v;
      }
  }
  // Comparing with a NaN is false, so the maximum may have lost one; the sum has not.
  for (int64_t i = first; i < last; ++i)
    if (a.sum_abs[i] != a.sum_abs[i]) a.max_abs[i] = float(a.sum_abs[i]);
}

void kernel(const ActStats& a, int64_t begin, int64_t end) {
  const int64_t first = begin * ActStats::block, end_of = end * ActStats::block;
  const int64_t last = end_of < a.channels ? end_of : a.channels;
  with_type(a.dtype, [&](auto* t) { channels<element<decltype(t)>>(a, first, last); });
}

}  // namespace fewbit::cpu::FEWBIT_ISA
