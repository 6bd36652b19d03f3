// GPTQ (fewbit/gptq.h): one launch per block of columns, a warp per row. Every chain of
// multiply-adds runs in the order of the CPU kernel, so codes, scales and zero points have its
// bits.
#include "codes.h"

namespace fewbit::cuda {

constexpr int lane_values = gptq_block / warp_size;
constexpr int gptq_warps = 16;
constexpr int gptq_threads = gptq_warps * warp_size;

// C above the diagonal of a block, row k after row k - 1.
FEWBIT_ALWAYS_INLINE int above_diagonal(int k, int column) {
  return k * (2 * gptq_block - k - 1) / 2 + column - k - 1;
}
constexpr int block_values = gptq_block * (gptq_block - 1) / 2;

FEWBIT_DEVICE int64_t column_at(const GptqRows& a, int64_t k) { return a.order ? a.order[k] : k; }

template <class T>
FEWBIT_DEVICE float weight_at(const GptqRows& a, int64_t row, int64_t k) {
  return to_float(static_cast<const T*>(a.w)[row * a.columns + column_at(a, k)]);
}

// The step of n values: of their range, or of the shrunk range with the least loss. Each lane tries
// its own ranges, so that the sum over the values runs in order.
template <class Value, class Importance>
FEWBIT_DEVICE Step fit_values(const GptqRows& a, int64_t n, const Value& value,
                              const Importance& importance) {
  const int lane = int(threadIdx.x) % warp_size;
  float lo = 0.0f, hi = 0.0f;
  for (int64_t i = lane; i < n; i += warp_size) {
    lo = Least()(lo, value(i));
    hi = Most()(hi, value(i));
  }
  lo = reduce_lanes(lo, warp_size, Least());
  hi = reduce_lanes(hi, warp_size, Most());
  if (a.points == 0) return make_step(lo, hi, a.grid);
  const auto step_of = [&](int64_t point) {
    const float keep = 1.0f - 0.8f * float(point) / float(a.points);
    return point == 0 ? make_step(lo, hi, a.grid) : make_step(keep * lo, keep * hi, a.grid);
  };
  const auto loss_of = [&](int64_t point) {
    const Coder g(step_of(point));
    float sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      const float v = value(i), d = v - (g.code(v) - g.z) * g.s;
      sum = fmaf(d * importance(i), d, sum);
    }
    return sum;
  };
  float least = 0.0f;
  int best = -1;  // -1: none tried
  for (int64_t point = lane; point < a.points; point += warp_size) {
    const float loss = loss_of(point);
    // As one loop over all points: the first stays unless a later one is truly less.
    if (best < 0 || loss < least) {
      least = loss;
      best = int(point);
    }
  }
  const float of_range = __shfl_sync(full_warp, lane == 0 ? loss_of(0) : 0.0f, 0);
  for (int d = warp_size / 2; d > 0; d /= 2) {
    const float other = __shfl_xor_sync(full_warp, least, d);
    const int from = __shfl_xor_sync(full_warp, best, d);
    if (from >= 0 && (best < 0 || other < least || (other == least && from < best) ||
                      (least != least && other == other))) {
      least = other;
      best = from;
    }
  }
  return step_of(least < of_range ? best : 0);
}

FEWBIT_DEVICE void put_step(const GptqRows& a, int64_t row, int64_t group, const Step& g) {
  a.scale[row * a.groups + group] = g.s;
  a.zero_point[row * a.groups + group] = uint8_t(g.z);
}

// Targets at the start: w in solving order.
template <class T>
__global__ void __launch_bounds__(gptq_threads, 1) gptq_targets(GptqRows a) {
  const int64_t at = int64_t(blockIdx.x) * gptq_threads + threadIdx.x;
  if (at < a.rows * a.columns) a.targets[at] = weight_at<T>(a, at / a.columns, at % a.columns);
}

// Groups that are fitted to the weights as they come: all of them ("before"), or the one group of
// a row. Columns are visited as the CPU does: in their own order, or in solving order.
template <class T>
__global__ void __launch_bounds__(gptq_threads, 1) gptq_fit(GptqRows a) {
  const int64_t at = int64_t(blockIdx.x) * gptq_warps + threadIdx.x / warp_size;
  if (at >= a.rows * a.groups) return;
  const int64_t row = at / a.groups, group = at % a.groups, start = group * a.group_size;
  const int64_t n = start + a.group_size <= a.columns ? a.group_size : a.columns - start;
  const bool solving = a.fit == GroupFit::in_order;
  const auto column = [&](int64_t i) { return solving ? column_at(a, i) : start + i; };
  const T* w = static_cast<const T*>(a.w) + row * a.columns;
  const Step g = fit_values(
      a, n, [&](int64_t i) { return to_float(w[column(i)]); },
      [&](int64_t i) { return a.importance ? a.importance[column(i)] : 1.0f; });
  if (threadIdx.x % warp_size == 0) put_step(a, row, group, g);
}

// Rounds columns [begin, end) of every row; errors w - w' into a.errors.
template <class T>
__global__ void __launch_bounds__(gptq_threads, 1) gptq_solve(GptqRows a) {
  float* c = reinterpret_cast<float*>(dynamic_shared());
  const int n = int(a.end - a.begin), lane = int(threadIdx.x) % warp_size;
  const int warp = int(threadIdx.x) / warp_size;
  for (int k = warp; k < n; k += gptq_warps)
    for (int i = k + 1 + lane; i < n; i += warp_size)
      c[above_diagonal(k, i)] = a.c[(a.begin + k) * a.columns + a.begin + i];
  __syncthreads();
  const int64_t at = int64_t(blockIdx.x) * gptq_warps + warp;
  const bool repeats = at >= a.rows;
  const int64_t row = repeats ? a.rows - 1 : at;
  float* group_values = c + block_values + warp * gptq_block;

  float x[lane_values], original[lane_values];  // columns lane, lane + 32, ..
#pragma unroll
  for (int i = 0; i < lane_values; ++i) {
    const int k = i * warp_size + lane;
    x[i] = k < n ? a.targets[row * a.columns + a.begin + k] : 0.0f;
    original[i] = k < n ? weight_at<T>(a, row, a.begin + k) : 0.0f;
  }
  // x[j] += d C_kj for this lane's columns behind k = 32 i + l.
  const auto compensate = [&](float (&v)[lane_values], float d, int i, int l, int last) {
    const int k = i * warp_size + l;
#pragma unroll
    for (int j = 0; j < lane_values; ++j) {
      const int column = j * warp_size + lane;
      if (j >= i && column > k && column < last) v[j] = fmaf(d, c[above_diagonal(k, column)], v[j]);
    }
  };
  const bool fits = a.fit == GroupFit::in_order && a.group_size <= gptq_block;

  const float qmax = float((1 << a.grid.bits) - 1);
  Coder g(1.0f, 0.0f, 0.0f, qmax);
  int64_t group = -1;
#pragma unroll
  for (int i = 0; i < lane_values; ++i) {
    for (int l = 0; l < warp_size && i * warp_size + l < n; ++l) {
      const int k = i * warp_size + l;
      const int64_t column = column_at(a, a.begin + k);
      if (column / a.group_size != group) {
        group = column / a.group_size;
        if (fits) {  // to the weights that are best given the columns before
          const int last = k + int(a.group_size);
          float best[lane_values];
#pragma unroll
          for (int j = 0; j < lane_values; ++j) best[j] = x[j];
          if (a.begin + k > 0)
#pragma unroll
            for (int p = 0; p < lane_values; ++p)
              for (int m = 0; m < warp_size; ++m) {
                const int j = p * warp_size + m;
                if (j < k || j >= last) continue;
                compensate(best, __shfl_sync(full_warp, original[p] - best[p], m), p, m, last);
              }
#pragma unroll
          for (int j = 0; j < lane_values; ++j) group_values[j * warp_size + lane] = best[j];
          __syncwarp();
          const Step fitted = fit_values(
              a, a.group_size, [&](int64_t v) { return group_values[k + v]; },
              [&](int64_t v) {
                return a.importance ? a.importance[column_at(a, a.begin + k + v)] : 1.0f;
              });
          __syncwarp();
          if (lane == 0 && !repeats) put_step(a, row, group, fitted);
          g = Coder(fitted);
        } else {
          const int64_t of_group = row * a.groups + group;
          g = Coder(a.scale[of_group], float(a.zero_point[of_group]), 0.0f, qmax);
        }
      }
      const float q = g.code(__shfl_sync(full_warp, x[i], l));
      const float d = __shfl_sync(full_warp, original[i], l) - (q - g.z) * g.s;
      if (lane == l) {
        x[i] = d;
        if (!repeats) a.q[row * a.columns + column] = uint8_t(q);
      }
      compensate(x, d, i, l, n);
    }
  }
  if (repeats) return;
#pragma unroll
  for (int i = 0; i < lane_values; ++i)
    if (i * warp_size + lane < n) a.errors[row * gptq_block + i * warp_size + lane] = x[i];
}

// targets[:, end ..] += errors C[begin .. end, end ..], each a chain over the block in order.
constexpr int update_tile = 64, update_depth = 16, update_threads = 256;
__global__ void __launch_bounds__(update_threads, 1) gptq_update(GptqRows a) {
  alignas(16) __shared__ float left[update_depth][update_tile + 4];
  alignas(16) __shared__ float right[update_depth][update_tile];
  const int t = int(threadIdx.x), tx = t % 16 * 4, ty = t / 16 * 4;
  const int64_t r0 = int64_t(blockIdx.y) * update_tile;
  const int64_t k0 = a.end + int64_t(blockIdx.x) * update_tile;
  const int64_t depth = a.end - a.begin;
  float sum[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      sum[i][j] = r0 + ty + i < a.rows && k0 + tx + j < a.columns
                      ? a.targets[(r0 + ty + i) * a.columns + k0 + tx + j]
                      : 0.0f;
  for (int64_t d0 = 0; d0 < depth; d0 += update_depth) {
    for (int at = t; at < update_depth * update_tile; at += update_threads) {
      const int row = at / update_depth, d = at % update_depth;
      left[d][row] =
          r0 + row < a.rows && d0 + d < depth ? a.errors[(r0 + row) * gptq_block + d0 + d] : 0.0f;
      const int column = at % update_tile, e = at / update_tile;
      right[e][column] = k0 + column < a.columns && d0 + e < depth
                             ? a.c[(a.begin + d0 + e) * a.columns + k0 + column]
                             : 0.0f;
    }
    __syncthreads();
    const int n = int(depth - d0 < update_depth ? depth - d0 : update_depth);
    for (int d = 0; d < n; ++d) {
      const Vector<float, 4> l = load<4>(&left[d][ty]), r = load<4>(&right[d][tx]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(l.v[i], r.v[j], sum[i][j]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (r0 + ty + i < a.rows && k0 + tx + j < a.columns)
        a.targets[(r0 + ty + i) * a.columns + k0 + tx + j] = sum[i][j];
}

bool serves(const GptqRows& a) {
  // In order, a group must lie inside a block, whatever the order of the groups is.
  return a.fit != GroupFit::in_order || a.groups <= 1 ||
         (gptq_block % a.group_size == 0 && a.columns % a.group_size == 0);
}

const char* launch(const GptqRows& args, Place place) {
  GptqRows a = args;
  if (a.rows == 0 || a.columns == 0) return nullptr;
  return with_type(a.dtype, [&](auto* type) -> const char* {
    using T = element<decltype(type)>;
    const dim3 elements(unsigned((a.rows * a.columns + gptq_threads - 1) / gptq_threads));
    const dim3 rows(unsigned((a.rows + gptq_warps - 1) / gptq_warps));
    const char* error = start(&gptq_targets<T>, elements, gptq_threads, 0, place, a);
    const bool whole = a.fit == GroupFit::in_order && a.group_size > gptq_block;
    if (error == nullptr && (a.fit == GroupFit::before || whole)) {
      const int64_t fits = a.rows * a.groups;
      error = start(&gptq_fit<T>, dim3(unsigned((fits + gptq_warps - 1) / gptq_warps)),
                    gptq_threads, 0, place, a);
    }
    constexpr size_t shared = (block_values + gptq_warps * gptq_block) * sizeof(float);
    for (a.begin = 0; a.begin < a.columns && error == nullptr; a.begin = a.end) {
      a.end = a.begin + gptq_block < a.columns ? a.begin + gptq_block : a.columns;
      error = start(&gptq_solve<T>, rows, gptq_threads, shared, place, a);
      if (error != nullptr || a.end == a.columns) continue;
      const dim3 tiles(unsigned((a.columns - a.end + update_tile - 1) / update_tile),
                       unsigned((a.rows + update_tile - 1) / update_tile));
      error = start(&gptq_update, tiles, update_threads, 0, place, a);
    }
    return error;
  });
}

}  // namespace fewbit::cuda
