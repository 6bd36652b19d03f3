// Few rows of x times packed weights on CUDA cores: a warp reads the layout as in product.h, so a
// lane has four rows of the weight and `lane_columns` columns at a time. Warps of a block take
// steps in turn; lanes, then warps, are added in a fixed order.
#pragma once
#include "product.h"

namespace fewbit::cuda {

constexpr int gemv_warps = 8;
constexpr int gemv_threads = gemv_warps * warp_size;

// Steps whose weights a warp has under way before it uses the first of them; as registers allow.
template <int bits>
constexpr int gemv_ahead = bits == 4   ? 4
                           : bits == 3 ? 1
                                       : 2;

template <class X, int bits, int m>
FEWBIT_DEVICE void gemv_run(const PackedProduct& a, const Work& work, const Run& run) {
  using S = Shape<X, bits, 1, 75>;
  constexpr int ahead = gemv_ahead<bits>;
  const PackedLayout& l = a.layout;
  const int lane = int(threadIdx.x) % warp_size, warp = int(threadIdx.x) / warp_size;
  const int g = lane / 4, t = lane % 4;
  const int64_t pair = run.tile, last_panel = l.panels() - 1;
  const int64_t panel = 2 * pair + g / 4 < last_panel ? 2 * pair + g / 4 : last_panel;
  const uint32_t* words =
      a.packed + panel * l.panel_words() + t * S::lane_words * panel_rows + 4 * (g % 4);
  const int64_t grid_at = panel * l.groups() * panel_rows + 4 * (g % 4);
  const int group_steps = int(l.group_size / S::step), steps = int(l.columns / S::step);
  const int64_t last = run.last * gemv_warps;
  const int end = last < steps ? int(last) : steps;

  float total[4][m] = {};
  for (int from = int(run.first) * gemv_warps + warp; from < end; from += gemv_warps * ahead) {
    Words w[ahead][S::lane_words];
#pragma unroll
    for (int s = 0; s < ahead; ++s)
#pragma unroll
      for (int i = 0; i < S::lane_words; ++i) {
        const int step = from + s * gemv_warps;
        if (step < end)
          w[s][i] = load<4>(words + (int64_t(step) * 4 * S::lane_words + i) * panel_rows);
      }
#pragma unroll
    for (int s = 0; s < ahead; ++s) {
      const int step = from + s * gemv_warps;
      if (step >= end) break;
      const int64_t at = grid_at + int64_t(step / group_steps) * panel_rows;
      const Vector<uint8_t, 4> z = load<4>(a.zero_point + at);
      float part[4][m] = {};
#pragma unroll
      for (int j = 0; j < S::lane_columns / 4; ++j) {
        float x[m][4];
#pragma unroll
        for (int r = 0; r < m; ++r) {
          const int k = step * S::step + t * S::lane_columns + 4 * j;
          const Vector<X, 4> in = load<4>(static_cast<const X*>(a.x) + r * l.columns + k);
#pragma unroll
          for (int i = 0; i < 4; ++i) x[r][i] = to_float(in.v[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t quad = quad_of_row<bits>(w[s], i, j);
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            // 2^23 + q, whose last bit is worth 1, less 2^23 + z: q - z, exact.
            const float q = float_of(__byte_perm(quad, 0x4B000000u, 0x7540u + unsigned(b))) -
                            (8388608.0f + float(z.v[i]));
#pragma unroll
            for (int r = 0; r < m; ++r) part[i][r] = fmaf(q, x[r][b], part[i][r]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float s_i = load_scale(a.scale, a.scale_dtype, at + i);
#pragma unroll
        for (int r = 0; r < m; ++r) total[i][r] += part[i][r] * s_i;
      }
    }
  }

  __shared__ float of_warp[gemv_warps][m][warp_rows];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int r = 0; r < m; ++r) {
      float v = total[i][r];
      v += __shfl_xor_sync(full_warp, v, 1);
      v += __shfl_xor_sync(full_warp, v, 2);
      if (t == 0) of_warp[warp][r][packed_row(g, i)] = v;
    }
  __syncthreads();
  for (int at = int(threadIdx.x); at < m * warp_rows; at += gemv_threads) {
    const int r = at / warp_rows, row = at % warp_rows;
    const int64_t n = pair * warp_rows + row;
    float v = 0.0f;
#pragma unroll
    for (int i = 0; i < gemv_warps; ++i) v += of_warp[i][r][row];
    if (!run.whole)
      static_cast<float*>(
          a.partial)[(work.slot(blockIdx.x, run.first == 0) * m + r) * warp_rows + row] = v;
    else if (n < l.rows)
      put(a, finish(a, v, r, n), r * l.rows + n);
  }
  __syncthreads();  // the next run writes of_warp again
}

template <class X, int bits, int m>
FEWBIT_DEVICE void gemv_block(const PackedProduct& a) {
  const Work work = work_of(a, m, warp_rows, gemv_warps * Shape<X, bits, 1, 75>::step);
  each_run(work, [&](const Run& run) { gemv_run<X, bits, m>(a, work, run); });
}

}  // namespace fewbit::cuda
