#include "fewbit/pack.h"

#include "codes.h"

namespace fewbit::cpu::FEWBIT_ISA {

// A scale or zero point of each row, one group of [rows, groups], to [16].
template <class T>
FEWBIT_INLINE void to_lanes(const void* in, int64_t from, int64_t groups, int64_t rows, void* out,
                            int64_t to) {
  T lanes[panel_rows];
  if (rows == panel_rows)
    for (int64_t r = 0; r < panel_rows; ++r)
      lanes[r] = static_cast<const T*>(in)[from + r * groups];
  else
    for (int64_t r = 0; r < panel_rows; ++r)
      lanes[r] = r < rows ? static_cast<const T*>(in)[from + r * groups] : T(0);
  __builtin_memcpy(static_cast<T*>(out) + to, lanes, sizeof lanes);
}

// Returns the panel's codes ored together, a byte each. `rows` of its 16 exist.
template <int bits>
static uint32_t pack_panel(const Pack& a, int64_t panel, int64_t rows) {
  using Unit = UnitRows<bits>;
  constexpr int units = tile_units<bits>;
  constexpr int64_t ahead = 1024;  // bytes of a row: sixteen streams, some asked for early
  const PackedLayout& l = a.layout;
  const int64_t groups = l.groups(), first = panel * panel_rows * groups;
  ask(static_cast<const char*>(a.scale) + first * a.scale_bytes, rows * groups * a.scale_bytes);
  ask(a.zero_point + first, rows * groups);
  uint32_t* out = a.packed + panel * l.panel_words();
  U32 all = U32::zero();
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t lanes = first + g * panel_rows;
    to_lanes<uint8_t>(a.zero_point, first + g, groups, rows, a.panel_zero_point, lanes);
    if (a.scale_bytes == 4)
      to_lanes<uint32_t>(a.scale, first + g, groups, rows, a.panel_scale, lanes);
    else
      to_lanes<uint16_t>(a.scale, first + g, groups, rows, a.panel_scale, lanes);
    const int64_t n = group_length(l, g);
    const uint8_t* q = a.q + panel * panel_rows * l.columns + group_start(l, g);
    for (int64_t k = 0; k < n; k += tile_columns) {
      const int64_t here = n - k < tile_columns ? n - k : tile_columns;
      const uint8_t* from = q + k;
      int64_t stride = l.columns;
      alignas(line) uint8_t edge[panel_rows * tile_columns];
      if (here < tile_columns || rows < panel_rows) {
        __builtin_memset(edge, 0, sizeof edge);
        for (int64_t r = 0; r < rows; ++r)
          __builtin_memcpy(edge + r * tile_columns, from + r * stride, size_t(here));
        from = edge;
        stride = tile_columns;
      } else {
        for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(from + r * stride + ahead);
      }
      alignas(line) uint32_t words[units * Unit::words * panel_rows];
      for (int64_t r = 0; r < panel_rows; r += F32::width) {
        Unit unit[units];
        load_tile(from + r * stride, stride, unit, all);
        for (int u = 0; u < units; ++u)
          for (int i = 0; i < Unit::words; ++i)
            unit[u].w[i].store(words + (u * Unit::words + i) * panel_rows + r);
      }
      const int64_t lines = ceil_div(here, Unit::columns) * Unit::words;
      put_lines(words, out, lines, a.stream);
      out += lines * panel_rows;
    }
  }
  uint32_t lanes[F32::width], any = 0;
  all.store(lanes);
  for (const uint32_t lane : lanes) any |= lane;
  return any;
}

void kernel(const Pack& a, int64_t begin, int64_t end) {
  const PackedLayout& l = a.layout;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * panel_rows, left = l.rows - first;
    const int64_t rows = left < panel_rows ? left : panel_rows;
    uint32_t any = 0;
    switch (l.bits) {
      case 2: any = pack_panel<2>(a, panel, rows); break;
      case 3: any = pack_panel<3>(a, panel, rows); break;
      case 4: any = pack_panel<4>(a, panel, rows); break;
      case 8: any = pack_panel<8>(a, panel, rows); break;
    }
    a.all[panel] = uint8_t(any | any >> 8 | any >> 16 | any >> 24);
  }
  stream_end();
}

}  // namespace fewbit::cpu::FEWBIT_ISA
