// One team of lanes per group of weights: its range, then a second look at every element.
#pragma once
#include "device.h"
#include "fewbit/grid.h"

namespace fewbit::cuda {

constexpr int group_threads = 256;

// Lanes that share a group: a power of two, enough for one access each where the group is short.
FEWBIT_ALWAYS_INLINE int team_lanes(int64_t group_size, int v) {
  int lanes = 1;
  while (lanes < warp_size && int64_t(lanes) * v < group_size) lanes *= 2;
  return lanes;
}

// The step of the caller's group, elements [0, n) at w; then visit(i, values) for every V of them.
// The first access of every lane stays in registers: a group of lanes * V is read once.
template <int V, class T, class Visit>
FEWBIT_DEVICE Step quantize_group(const T* w, int64_t n, int lanes, int lane, const Grid& grid,
                                  const Visit& visit) {
  float first[V] = {};
  float lo = 0.0f, hi = 0.0f;
  for (int64_t i = int64_t(lane) * V; i < n; i += int64_t(lanes) * V) {
    const Vector<T, V> x = load<V>(w + i);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float v = to_float(x.v[j]);
      if (i == int64_t(lane) * V) first[j] = v;
      lo = Least()(lo, v);
      hi = Most()(hi, v);
    }
  }
  lo = reduce_lanes(lo, lanes, Least());
  hi = reduce_lanes(hi, lanes, Most());
  const Step step = make_step(lo, hi, grid);
  if (int64_t(lane) * V < n) visit(int64_t(lane) * V, first, step);
  for (int64_t i = int64_t(lane + lanes) * V; i < n; i += int64_t(lanes) * V) {
    const Vector<T, V> x = load<V>(w + i);
    float values[V];
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] = to_float(x.v[j]);
    visit(i, values, step);
  }
  return step;
}

// Which group a thread works on. Teams past the last have no elements and no index: they are there
// so that warps stay whole.
struct Team {
  int64_t index;  // of the group, row after row; or -1
  int64_t start;  // of its elements, row after row
  int64_t column, n;
  int lane;
};

FEWBIT_DEVICE Team team_of(int64_t rows, int64_t columns, int64_t group_size, int lanes) {
  const int64_t groups = (columns + group_size - 1) / group_size, count = rows * groups;
  const int64_t at = (int64_t(blockIdx.x) * group_threads + threadIdx.x) / lanes;
  const int lane = int(threadIdx.x) % lanes;
  if (at >= count) return {-1, 0, 0, 0, lane};
  const int64_t row = at / groups, column = (at - row * groups) * group_size;
  const int64_t left = columns - column;
  return {at, row * columns + column, column, left < group_size ? left : group_size, lane};
}

inline unsigned team_blocks(int64_t rows, int64_t columns, int64_t group_size, int lanes) {
  const int64_t teams = group_threads / lanes;
  const int64_t groups = (columns + group_size - 1) / group_size;
  return unsigned((rows * groups + teams - 1) / teams);
}

}  // namespace fewbit::cuda
