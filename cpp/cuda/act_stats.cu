#include "device.h"
#include "fewbit/act_stats.h"

namespace fewbit::cuda {

constexpr int stats_threads = 64;  // few per block: channels are few, and every SM is to have some

// One chain per channel, tokens in order, in float64: the same bits as on the CPU. Loads of eight
// tokens are under way while their sums are added.
template <class T>
__global__ void act_stats(ActStats a) {
  const int64_t c = int64_t(blockIdx.x) * stats_threads + threadIdx.x;
  if (c >= a.channels) return;
  const T* x = static_cast<const T*>(a.x) + c;
  double sum = a.sum_abs[c];
  float top = a.max_abs[c];
  constexpr int ahead = 8;
  for (int64_t t = 0; t < a.tokens; t += ahead) {
    float v[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i)
      v[i] = t + i < a.tokens ? abs_of(to_float(x[(t + i) * a.channels])) : 0.0f;
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      sum += double(v[i]);
      top = v[i] <= top ? top : v[i];  // a NaN, once in, makes this false and stays
    }
  }
  a.sum_abs[c] = sum;
  a.max_abs[c] = sum != sum ? float(sum) : top;
}

const char* launch(const ActStats& a, Place place) {
  const dim3 grid(unsigned((a.channels + stats_threads - 1) / stats_threads));
  return with_type(a.dtype, [&](auto* type) {
    return start(&act_stats<element<decltype(type)>>, grid, stats_threads, 0, place, a);
  });
}

}  // namespace fewbit::cuda
