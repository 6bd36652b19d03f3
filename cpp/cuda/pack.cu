#include "fewbit/pack.h"
#include "units.h"

namespace fewbit::cuda {

constexpr int pack_threads = 256;

// A block packs a panel: thread t takes row t % 16 of every 16th unit, so that a warp writes whole
// sectors and the block reads whole ones.
template <int bits>
__global__ void __launch_bounds__(pack_threads, 1) pack(Pack a) {
  constexpr int columns = int(unit_columns(bits));
  const PackedLayout& l = a.layout;
  const int64_t panel = blockIdx.x, r = threadIdx.x % panel_rows, row = panel * panel_rows + r;
  bool exceeds = false;
  uint32_t* out = a.packed + panel * l.panel_words() + r;
  const bool whole = whole_units<bits>(l, a.q);
  const int64_t units = l.units(), groups = l.groups();
#pragma unroll 2
  for (int64_t u = threadIdx.x / panel_rows; u < units; u += pack_threads / panel_rows) {
    uint32_t quad[columns / 4] = {};
    if (row < l.rows && whole) {
      load_quads<bits>(a.q + row * l.columns + u * columns, quad);
    } else if (row < l.rows) {
      const UnitSpan span = unit_span(l, u);
      const uint8_t* q = a.q + row * l.columns + span.start;
#pragma unroll
      for (int i = 0; i < columns; ++i)
        if (i < span.n) quad[i / 4] |= uint32_t(q[i]) << 8 * (i % 4);
    }
#pragma unroll
    for (int j = 0; j < columns / 4; ++j) exceeds |= (quad[j] & ~code_mask<bits>()) != 0;
    put_quads<bits>(quad, out + u * unit_words(bits) * panel_rows);
  }
  for (int64_t g = threadIdx.x / panel_rows; g < groups; g += pack_threads / panel_rows) {
    const int64_t to = (panel * groups + g) * panel_rows + r, from = row * groups + g;
    const bool inside = row < l.rows;
    a.panel_zero_point[to] = inside ? a.zero_point[from] : uint8_t(0);
    if (a.scale_bytes == 4)
      static_cast<uint32_t*>(a.panel_scale)[to] =
          inside ? static_cast<const uint32_t*>(a.scale)[from] : 0u;
    else
      static_cast<uint16_t*>(a.panel_scale)[to] =
          inside ? static_cast<const uint16_t*>(a.scale)[from] : uint16_t(0);
  }
  const float any = reduce_block(exceeds ? 1.0f : 0.0f, Most());
  if (threadIdx.x == 0) a.all[panel] = any > 0.0f ? uint8_t(0xFF) : uint8_t(0);
}

const char* launch(const Pack& a, Place place) {
  const dim3 grid(unsigned(a.layout.panels()));
  switch (a.layout.bits) {
    case 2: return start(&pack<2>, grid, pack_threads, 0, place, a);
    case 3: return start(&pack<3>, grid, pack_threads, 0, place, a);
    case 4: return start(&pack<4>, grid, pack_threads, 0, place, a);
    default: return start(&pack<8>, grid, pack_threads, 0, place, a);
  }
}

}  // namespace fewbit::cuda
