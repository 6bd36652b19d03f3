#include "device.h"
#include "fewbit/w4a4_linear.h"

namespace fewbit::cuda {

constexpr int fours_threads = 256;

__global__ void __launch_bounds__(fours_threads, 1) fours_of_words(FoursOfWords a) {
  const int64_t at = int64_t(blockIdx.x) * fours_threads + threadIdx.x;
  if (at >= a.m * (a.columns / 8)) return;
  const uint32_t word = a.words[at];
  Vector<int8_t, 8> q;
#pragma unroll
  for (int i = 0; i < 8; ++i) q.v[i] = four_of_word(word, i);
  store(a.q + at * 8, q);
}

const char* launch(const FoursOfWords& a, Place place) {
  const int64_t blocks = (a.m * (a.columns / 8) + fours_threads - 1) / fours_threads;
  return start(&fours_of_words, dim3(unsigned(blocks)), fours_threads, 0, place, a);
}

}  // namespace fewbit::cuda
