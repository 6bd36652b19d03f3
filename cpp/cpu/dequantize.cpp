#include "fewbit/dequantize.h"

#include "simd.h"

namespace fewbit::cpu::FEWBIT_ISA {

template <class T>
static void rows(const Dequantize& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t group = 0; group < a.groups; ++group) {
      const int64_t start = group * a.group_size;
      const int64_t n = start + a.group_size <= a.columns ? a.group_size : a.columns - start;
      const uint8_t* q = a.q + r * a.columns + start;
      T* out = static_cast<T*>(a.out) + r * a.columns + start;
      const float s = a.scale[r * a.groups + group];
      const float z = float(a.zero_point[r * a.groups + group]);
      put_pieces<T>(n, a.stream, out, [&](int64_t k, int64_t c, T* to) {
        int64_t i = 0;
        for (; i < c; i += line) ask_ahead(q + k + i);
        for (i = 0; i + F32::width <= c; i += F32::width)
          ((F32::load(q + k + i) - F32::set(z)) * F32::set(s)).store(to + i);
        for (; i < c; ++i) from_float((float(q[k + i]) - z) * s, to + i);
      });
    }
  }
}

void kernel(const Dequantize& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto* t) { rows<element<decltype(t)>>(a, begin, end); });
  stream_end();
}

}  // namespace fewbit::cpu::FEWBIT_ISA
