#include "device.h"
#include "fewbit/act_stats.h"

namespace fewbit::cuda {

constexpr int stats_threads = 32;  // channels are few, and every SM is to have some blocks

// One chain per channel, tokens in order, in float64: the same bits as on the CPU, and, as there
// (cpp/cpu/act_stats.cpp), of |x| 2^-896, which takes moved bits and no conversion: cards for games
// and T4s convert to float64 32 times slower than they load. Many tokens are under way at a time.
template <class T>
__global__ void __launch_bounds__(stats_threads, 1) act_stats(ActStats a) {
  const int64_t c = int64_t(blockIdx.x) * stats_threads + threadIdx.x;
  if (c >= a.channels) return;
  const T* x = static_cast<const T*>(a.x) + c;
  const float before = a.max_abs[c];
  double sum = a.sum_abs[c];
  const bool lost = sum != sum || before != before;
  // Numbers from 0 on are in the order of their bits, and a NaN is the largest.
  int32_t top = lost ? 0x7FC00000 : int32_t(bits_of(before));
  sum *= 0x1p-896;
  const auto add = [&](float v) {
    const uint32_t u = bits_of(abs_of(v));
    sum += __builtin_bit_cast(double, uint64_t(u) << 29);
    top = int32_t(u) > top ? int32_t(u) : top;
  };
  constexpr int ahead = 16;
  int64_t t = 0;
#pragma unroll 1
  for (; t + ahead <= a.tokens; t += ahead) {
    T v[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i, x += a.channels) v[i] = *x;
#pragma unroll
    for (int i = 0; i < ahead; ++i) add(to_float(v[i]));
  }
#pragma unroll 1
  for (; t < a.tokens; ++t, x += a.channels) add(to_float(*x));
  sum *= 0x1p896;
  const float most = float_of(uint32_t(top));
  a.max_abs[c] = most;
  a.sum_abs[c] = most <= 3.4028235e38f ? sum : double(most);
}

const char* launch(const ActStats& a, Place place) {
  const dim3 grid(unsigned((a.channels + stats_threads - 1) / stats_threads));
  return with_type(a.dtype, [&](auto* type) {
    return start(&act_stats<element<decltype(type)>>, grid, stats_threads, 0, place, a);
  });
}

}  // namespace fewbit::cuda
