// A block quantises one row (token); `value(k)` is its k-th element, computed anew at each look.
#pragma once
#include "device.h"
#include "fewbit/quantize_per_token.h"

namespace fewbit::cuda {

// V columns k .. k + V - 1 at a time: value(k, v) fills v.
template <int V, class Value>
FEWBIT_DEVICE TokenStep fit_row(int64_t columns, TokenGrid grid, const Value& value) {
  float lo = 0.0f, hi = 0.0f, poison = 0.0f;
  for (int64_t k = int64_t(threadIdx.x) * V; k < columns; k += int64_t(blockDim.x) * V) {
    float v[V];
    value(k, v);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      lo = Least()(lo, v[j]);
      hi = Most()(hi, v[j]);
      poison += v[j] * 0.0f;  // NaN where v is not finite
    }
  }
  lo = reduce_block(lo, Least());
  hi = reduce_block(hi, Most());
  poison = reduce_block(poison, Sum());
  return token_step(lo, hi, poison == 0.0f, grid);
}

template <int V, class Value>
FEWBIT_DEVICE void quantize_row(int64_t columns, TokenGrid grid, TokenStep step, int8_t* q,
                                const Value& value) {
  for (int64_t k = int64_t(threadIdx.x) * V; k < columns; k += int64_t(blockDim.x) * V) {
    float v[V];
    value(k, v);
    Vector<int8_t, V> codes;
#pragma unroll
    for (int j = 0; j < V; ++j) codes.v[j] = token_code(v[j], step, grid);
    store(q + k, codes);
  }
}

// The same to 4-bit codes, eight to a word.
template <class Value>
FEWBIT_DEVICE void quantize_row_to_words(int64_t columns, TokenGrid grid, TokenStep step,
                                         uint32_t* words, const Value& value) {
  for (int64_t at = threadIdx.x; at < columns / 8; at += blockDim.x) {
    float v[8];
    value(at * 8, v);
    uint32_t four[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; ++j)
      four[j / 4] |= uint32_t(uint8_t(token_code(v[j], step, grid))) << 8 * (j % 4);
    words[at] = word_of_fours(four[0], four[1]);
  }
}

}  // namespace fewbit::cuda
