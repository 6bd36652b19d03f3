// One team of lanes per group of weights: its range, then a second look at every element.
#pragma once
#include "codes.h"

namespace fewbit::cuda {

constexpr int group_threads = 256;
constexpr int held = 4;  // accesses of a lane that stay in registers: what a team reads once

// An op on groups, and how they are shared out.
template <class Args>
struct Groups {
  Args a;
  int64_t count, in_row;  // groups
  int log_lanes;          // of a team: a power of two, for `accesses` of each where they suffice
  bool whole;             // no group is short: they lie one after the other
};

template <class Args>
Groups<Args> groups_of(const Args& a, int v, int accesses = held) {
  const int64_t in_row = ceil_div(a.columns, a.group_size);
  // Two lanes at least, where there is work for them: together they access a sector of 32 bytes.
  int log_lanes = v < a.group_size ? 1 : 0;
  while (warp_size >> log_lanes > 1 && (int64_t(v) * accesses << log_lanes) < a.group_size)
    ++log_lanes;
  return {a, a.rows * in_row, in_row, log_lanes, in_row * a.group_size == a.columns};
}

template <class Args>
unsigned blocks_for(const Groups<Args>& g) {
  return unsigned(ceil_div(g.count, group_threads >> g.log_lanes));
}

// The kernel for accesses of 16 bytes, or that for single elements.
template <class T, class Args>
const char* start_groups(void (*whole)(Groups<Args>), void (*single)(Groups<Args>), bool is_whole,
                         const Args& a, Place place, int accesses = held) {
  const Groups<Args> g = groups_of(a, is_whole ? in_access<T> : 1, accesses);
  return start(is_whole ? whole : single, blocks_for(g), group_threads, 0, place, g);
}

// Which group a thread works on. Teams past the last have no elements and no index: they are there
// so that warps stay whole.
struct Team {
  int64_t index;  // of the group, row after row; or -1
  int64_t start;  // of its elements, row after row
  int64_t n;
  int lane, lanes;

  // f(i) for this lane's accesses of V elements, but for the first `after` of them.
  template <int V, class F>
  FEWBIT_DEVICE void each(int after, const F& f) const {
    for (int64_t i = (lane + after * lanes) * V; i < n; i += lanes * V) f(i);
  }
};

template <class Args>
FEWBIT_DEVICE Team team_of(const Groups<Args>& g) {
  const int lanes = 1 << g.log_lanes, lane = int(threadIdx.x) & (lanes - 1);
  const int64_t at =
      int64_t(blockIdx.x) * (group_threads >> g.log_lanes) + (int(threadIdx.x) >> g.log_lanes);
  if (at >= g.count) return {-1, 0, 0, lane, lanes};
  const int64_t size = g.a.group_size;
  if (g.whole) return {at, at * size, size, lane, lanes};
  const int64_t row = at / g.in_row, column = (at - row * g.in_row) * size;
  const int64_t left = g.a.columns - column;
  return {at, row * g.a.columns + column, left < size ? left : size, lane, lanes};
}

// The step of the team's group, which begins at w; then visit(i, values, coder) for every V
// elements of it.
template <int V, class T, class Visit>
FEWBIT_DEVICE Step quantize_group(const T* w, const Team& t, const Grid& grid, const Visit& visit) {
  float v[held][V];
  float lo = 0.0f, hi = 0.0f;
  const auto widen = [&](const float (&by)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      lo = fminf(lo, by[j]);
      hi = fmaxf(hi, by[j]);
    }
  };
  const int first = t.lane * V, stride = t.lanes * V;
  // All loads are under way before the first is used.
#pragma unroll
  for (int h = 0; h < held; ++h)
    if (first + h * stride < t.n) load_floats<V>(w + first + h * stride, v[h]);
#pragma unroll
  for (int h = 0; h < held; ++h)
    if (first + h * stride < t.n) widen(v[h]);
  t.each<V>(held, [&](int64_t i) {
    float more[V];
    load_floats<V>(w + i, more);
    widen(more);
  });
  lo = reduce_lanes(lo, t.lanes, Least());
  hi = reduce_lanes(hi, t.lanes, Most());
  const Step step = make_step(lo, hi, grid);
  const Coder coder(step);
#pragma unroll
  for (int h = 0; h < held; ++h)
    if (first + h * stride < t.n) visit(first + h * stride, v[h], coder);
  t.each<V>(held, [&](int64_t i) {
    float more[V];
    load_floats<V>(w + i, more);
    visit(i, more, coder);
  });
  return step;
}

}  // namespace fewbit::cuda
