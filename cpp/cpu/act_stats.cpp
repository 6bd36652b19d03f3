#include "fewbit/act_stats.h"

#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

template <class T>
static void channels(const ActStats& a, int64_t first, int64_t last) {
  const int64_t n = last - first;
  double sum[ActStats::block];
  float top[ActStats::block];
  for (int64_t i = 0; i < n; ++i) {
    sum[i] = a.sum_abs[first + i];
    top[i] = a.max_abs[first + i];
  }
  for (int64_t t = 0; t < a.tokens; ++t) {
    const T* x = static_cast<const T*>(a.x) + t * a.channels + first;
    float v[ActStats::block];
    int64_t i = 0;
    for (; i + F32::width <= n; i += F32::width) abs(F32::load(x + i)).store(v + i);
    for (; i < n; ++i) v[i] = abs_of(to_float(x[i]));
    for (i = 0; i < n; ++i) {  // independent chains: vectorised by the compiler
      sum[i] += double(v[i]);
      top[i] = v[i] <= top[i] ? top[i] : v[i];  // a NaN, once in, makes this false and stays
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    a.sum_abs[first + i] = sum[i];
    // NaN > x and x > NaN are both false above; the sum remembers one that was overwritten.
    a.max_abs[first + i] = sum[i] != sum[i] ? float(sum[i]) : top[i];
  }
}

void kernel(const ActStats& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * ActStats::block;
    const int64_t end_of = first + ActStats::block;
    const int64_t last = end_of < a.channels ? end_of : a.channels;
    with_type(a.dtype, [&](auto* t) { channels<element<decltype(t)>>(a, first, last); });
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
