#include "units.h"

namespace fewbit::cuda {

constexpr int dense_threads = 256;

// Thread t has row t % 16 of a panel and one unit: a warp reads 16 neighbouring words of two units.
// Panels go along x, which may be long, and the units of a panel along y.
template <class T, int bits>
__global__ void __launch_bounds__(dense_threads, 1) dense_packed(DensePacked a) {
  constexpr int columns = int(unit_columns(bits));
  const PackedLayout& l = a.layout;
  const int64_t r = threadIdx.x % panel_rows, panel = blockIdx.x, row = panel * panel_rows + r;
  const int64_t u = int64_t(blockIdx.y) * (dense_threads / panel_rows) + threadIdx.x / panel_rows;
  if (row >= l.rows || u >= l.units()) return;
  const uint32_t* in = a.packed + panel * l.panel_words() + u * unit_words(bits) * panel_rows + r;
  uint32_t word[unit_words(bits)];
#pragma unroll
  for (int i = 0; i < unit_words(bits); ++i) word[i] = in[i * panel_rows];
  const int64_t at = (panel * l.groups() + u / l.group_units()) * panel_rows + r;
  const float s = load_scale(a.scale, a.scale_dtype, at), z = float(a.zero_point[at]);
  const UnitSpan span = unit_span(l, u);
  T* out = static_cast<T*>(a.out) + row * l.columns + span.start;
  // Sixteen bytes at a time where the unit is whole and lies so.
  constexpr int v = columns < in_access<T> ? columns : in_access<T>;
  const bool vectors = span.n == columns && reinterpret_cast<uintptr_t>(out) % (v * sizeof(T)) == 0;
#pragma unroll
  for (int i = 0; i < columns; i += v) {
    Vector<T, v> w;
#pragma unroll
    for (int j = 0; j < v; ++j) {
      const uint32_t code = quad_of<bits>(word, (i + j) / 4) >> 8 * ((i + j) % 4) & 0xFFu;
      from_float((float(code) - z) * s, &w.v[j]);
    }
    if (vectors) {
      store(out + i, w);
    } else {
#pragma unroll
      for (int j = 0; j < v; ++j)
        if (i + j < span.n) out[i + j] = w.v[j];
    }
  }
}

const char* launch(const DensePacked& a, Place place) {
  const PackedLayout& l = a.layout;
  const dim3 grid(unsigned(l.panels()), unsigned(ceil_div(l.units(), dense_threads / panel_rows)));
  return with_type(a.dtype, [&](auto* type) -> const char* {
    using T = element<decltype(type)>;
    switch (l.bits) {
      case 2: return start(&dense_packed<T, 2>, grid, dense_threads, 0, place, a);
      case 3: return start(&dense_packed<T, 3>, grid, dense_threads, 0, place, a);
      case 4: return start(&dense_packed<T, 4>, grid, dense_threads, 0, place, a);
      default: return start(&dense_packed<T, 8>, grid, dense_threads, 0, place, a);
    }
  });
}

}  // namespace fewbit::cuda
