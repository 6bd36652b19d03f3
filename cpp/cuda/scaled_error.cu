#include "fewbit/scaled_error.h"
#include "groups.h"

namespace fewbit::cuda {

// A team of lanes has a group of weights and tries all scales on it; what the group's first access
// brought stays in registers, so weights are read once.
template <class T, int V>
__global__ void __launch_bounds__(group_threads, 1) scaled_error(Groups<ScaledError> groups) {
  const ScaledError& a = groups.a;
  const Team t = team_of(groups);
  const T* w = static_cast<const T*>(a.w) + t.start;
  const int64_t mine = int64_t(t.lane) * V, column = t.start % a.columns;
  const Vector<T, V> first = mine < t.n ? load<V>(w + mine) : Vector<T, V>{};
  // f(i, w, s) for this lane's accesses.
  const auto each = [&](const float* s, const auto& f) {
    t.each<V>(0, [&](int64_t i) {
      const Vector<T, V> x = i == mine ? first : load<V>(w + i);
      float by[V], v[V];
      load_floats<(V < 4 ? 1 : 4)>(s + i, by);
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] = to_float(x.v[j]);
      f(i, v, by);
    });
  };
  for (int64_t c = 0; c < a.count; ++c) {
    const float* s = a.scale + c * a.columns + column;
    float lo = 0.0f, hi = 0.0f;
    each(s, [&](int64_t, const float (&v)[V], const float (&by)[V]) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        lo = Least()(lo, v[j] * by[j]);
        hi = Most()(hi, v[j] * by[j]);
      }
    });
    lo = reduce_lanes(lo, t.lanes, Least());
    hi = reduce_lanes(hi, t.lanes, Most());
    const Coder coder(make_step(lo, hi, a.grid));
    T* error = static_cast<T*>(a.error) + c * a.rows * a.columns + t.start;
    each(s, [&](int64_t i, const float (&v)[V], const float (&by)[V]) {
      float scaled[V], code[V];
#pragma unroll
      for (int j = 0; j < V; ++j) scaled[j] = v[j] * by[j];
      coder.shifted_codes(scaled, code);
      const Vector<float, V> y = coder.template values<float>(code);
      Vector<T, V> e;
#pragma unroll
      for (int j = 0; j < V; ++j) from_float(y.v[j] / by[j] - v[j], &e.v[j]);
      store(error + i, e);
    });
  }
}

const char* launch(const ScaledError& a, Place place) {
  if (a.rows == 0 || a.columns == 0 || a.count == 0) return nullptr;
  return with_type(a.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    const bool whole = wide<T>(a.columns, a.group_size, a.w) &&
                       wide<T>(a.columns, a.group_size, a.error) && at_16(a.scale);
    return start_groups<T>(&scaled_error<T, in_access<T>>, &scaled_error<T, 1>, whole, a, place, 1);
  });
}

}  // namespace fewbit::cuda
