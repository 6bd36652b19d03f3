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
    for (int64_t i = 0; i < n; ++i) {  // independent chains: vectorised by the compiler
      const float v = abs_of(to_float(x[i]));
      sum[i] += double(v);
      top[i] = v <= top[i] ? top[i] : v;  // a NaN, once in, makes this false and stays
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
    const int64_t last = first + ActStats::block < a.channels ? first + ActStats::block : a.channels;
    with_type(a.dtype, [&](auto* t) { channels<element<decltype(t)>>(a, first, last); });
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
