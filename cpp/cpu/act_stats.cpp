#include "fewbit/act_stats.h"

#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

// Tokens whose values of one channel are added before its sums are stored again.
constexpr int64_t depth = 8;

template <class T>
static void channels(const ActStats& a, int64_t first, int64_t last) {
  const T* x = static_cast<const T*>(a.x);
  // Sums of shrunk values round as those of the values do: powers of two shift exponents alone, and
  // what they make subnormal is below 2^-126, where every float is a multiple of 2^-149 and every
  // sum of floats exact, shrunk or not.
  for (int64_t i = first; i < last; ++i) {
    const bool lost = a.sum_abs[i] != a.sum_abs[i] || a.max_abs[i] != a.max_abs[i];
    a.max_abs[i] = lost ? __builtin_nanf("") : a.max_abs[i];  // of the sign that max_abs keeps
    a.sum_abs[i] *= 0x1p-896;
  }
  for (int64_t t0 = 0; t0 < a.tokens; t0 += depth) {
    const int64_t t1 = t0 + depth < a.tokens ? t0 + depth : a.tokens;
    int64_t i = first;
    for (; i + F32::width <= last; i += F32::width) {
      Halves sum = Halves::load(a.sum_abs + i);
      F32 top = F32::load(a.max_abs + i);
      for (int64_t t = t0; t < t1; ++t) {
        const F32 v = F32::load(x + t * a.channels + i);
        ask_later(x + (t + depth) * a.channels + i);  // rows may be pages apart
        sum = sum + shrunk_abs(v);
        top = max_abs(top, v);
      }
      sum.store(a.sum_abs + i);
      top.store(a.max_abs + i);
    }
    for (; i < last; ++i)
      for (int64_t t = t0; t < t1; ++t) {
        const float v = to_float(x[t * a.channels + i]);
        a.sum_abs[i] += double(abs_of(v)) * 0x1p-896;
        a.max_abs[i] = max_abs(a.max_abs[i], v);
      }
  }
  for (int64_t i = first; i < last; ++i) {
    a.sum_abs[i] *= 0x1p896;
    // Infinities and NaNs, which shrunk bits do not tell from numbers, are in the maximum.
    if (!(a.max_abs[i] < __builtin_inff())) a.sum_abs[i] = double(a.max_abs[i]);
  }
}

void kernel(const ActStats& a, int64_t begin, int64_t end) {
  const int64_t first = begin * ActStats::block, end_of = end * ActStats::block;
  const int64_t last = end_of < a.channels ? end_of : a.channels;
  with_type(a.dtype, [&](auto* t) { channels<element<decltype(t)>>(a, first, last); });
}

}  // namespace fewbit::cpu::FEWBIT_ISA
