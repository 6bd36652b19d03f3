#include "fewbit/unpack.h"
#include "units.h"

namespace fewbit::cuda {

constexpr int unpack_threads = 256;

template <int bits>
__global__ void __launch_bounds__(unpack_threads, 1) unpack(Unpack a) {
  constexpr int columns = int(unit_columns(bits));
  const PackedLayout& l = a.layout;
  const int64_t panel = blockIdx.x, r = threadIdx.x % panel_rows, row = panel * panel_rows + r;
  if (row >= l.rows) return;
  const uint32_t* in = a.packed + panel * l.panel_words() + r;
  const bool whole = whole_units<bits>(l, a.q);
  const int64_t units = l.units(), groups = l.groups();
#pragma unroll 2
  for (int64_t u = threadIdx.x / panel_rows; u < units; u += unpack_threads / panel_rows) {
    uint32_t word[unit_words(bits)];
#pragma unroll
    for (int i = 0; i < unit_words(bits); ++i)
      word[i] = in[(u * unit_words(bits) + i) * panel_rows];
    if (whole) {
      uint32_t quad[columns / 4];
#pragma unroll
      for (int j = 0; j < columns / 4; ++j) quad[j] = quad_of<bits>(word, j);
      store_quads<bits>(quad, a.q + row * l.columns + u * columns);
      continue;
    }
    const UnitSpan span = unit_span(l, u);
    uint8_t* q = a.q + row * l.columns + span.start;
#pragma unroll
    for (int i = 0; i < columns; ++i)
      if (i < span.n) q[i] = uint8_t(quad_of<bits>(word, i / 4) >> 8 * (i % 4));
  }
  for (int64_t g = threadIdx.x / panel_rows; g < groups; g += unpack_threads / panel_rows) {
    const int64_t from = (panel * groups + g) * panel_rows + r, to = row * groups + g;
    a.zero_point[to] = a.panel_zero_point[from];
    if (a.scale_bytes == 4)
      static_cast<uint32_t*>(a.scale)[to] = static_cast<const uint32_t*>(a.panel_scale)[from];
    else
      static_cast<uint16_t*>(a.scale)[to] = static_cast<const uint16_t*>(a.panel_scale)[from];
  }
}

const char* launch(const Unpack& a, Place place) {
  const dim3 grid(unsigned(a.layout.panels()));
  switch (a.layout.bits) {
    case 2: return start(&unpack<2>, grid, unpack_threads, 0, place, a);
    case 3: return start(&unpack<3>, grid, unpack_threads, 0, place, a);
    case 4: return start(&unpack<4>, grid, unpack_threads, 0, place, a);
    default: return start(&unpack<8>, grid, unpack_threads, 0, place, a);
  }
}

}  // namespace fewbit::cuda
