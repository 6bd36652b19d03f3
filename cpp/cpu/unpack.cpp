#include "fewbit/unpack.h"

#include "codes.h"

namespace fewbit::cpu::FEWBIT_ISA {

// A scale or zero point of each row from [16] to one group of [rows, groups].
template <class T>
FEWBIT_INLINE void from_lanes(const void* in, int64_t from, void* out, int64_t to, int64_t groups,
                              int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    static_cast<T*>(out)[to + r * groups] = static_cast<const T*>(in)[from + r];
}

// `rows` of the panel's 16 exist.
template <int bits>
static void unpack_panel(const Unpack& a, int64_t panel, int64_t rows) {
  using Unit = UnitRows<bits>;
  constexpr int units = tile_units<bits>;
  const PackedLayout& l = a.layout;
  const int64_t groups = l.groups(), first = panel * panel_rows * groups;
  ask(static_cast<char*>(a.scale) + first * a.scale_bytes, rows * groups * a.scale_bytes);
  ask(a.zero_point + first, rows * groups);
  const uint32_t* in = a.packed + panel * l.panel_words();
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t lanes = first + g * panel_rows;
    from_lanes<uint8_t>(a.panel_zero_point, lanes, a.zero_point, first + g, groups, rows);
    if (a.scale_bytes == 4)
      from_lanes<uint32_t>(a.panel_scale, lanes, a.scale, first + g, groups, rows);
    else
      from_lanes<uint16_t>(a.panel_scale, lanes, a.scale, first + g, groups, rows);
    const int64_t n = group_length(l, g);
    uint8_t* q = a.q + panel * panel_rows * l.columns + group_start(l, g);
    for (int64_t k = 0; k < n; k += tile_columns) {
      const int64_t here = n - k < tile_columns ? n - k : tile_columns;
      const int64_t last = ceil_div(here, Unit::columns) - 1;
      alignas(line) uint8_t codes[panel_rows * tile_columns];
      for (int64_t r = 0; r < panel_rows; r += F32::width) {
        Unit unit[units];
        for (int u = 0; u < units; ++u) {
          // Where the group ends before the tile: its last unit again, dropped below.
          const uint32_t* from = in + (u < last ? u : last) * Unit::words * panel_rows + r;
          unit[u] = Unit::load(from);
          for (int i = 0; i < Unit::words && r == 0; ++i) ask_ahead(from + i * panel_rows);
        }
        store_tile(unit, codes + r * tile_columns, tile_columns);
      }
      in += (last + 1) * Unit::words * panel_rows;
      for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* from = codes + r * tile_columns;
        uint8_t* to = q + r * l.columns + k;
        if (here == tile_columns)
          put_lines(from, to, 1, a.stream);
        else
          __builtin_memcpy(to, from, size_t(here));
      }
    }
  }
}

void kernel(const Unpack& a, int64_t begin, int64_t end) {
  const PackedLayout& l = a.layout;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * panel_rows, left = l.rows - first;
    const int64_t rows = left < panel_rows ? left : panel_rows;
    switch (l.bits) {
      case 2: unpack_panel<2>(a, panel, rows); break;
      case 3: unpack_panel<3>(a, panel, rows); break;
      case 4: unpack_panel<4>(a, panel, rows); break;
      case 8: unpack_panel<8>(a, panel, rows); break;
    }
  }
  stream_end();
}

}  // namespace fewbit::cpu::FEWBIT_ISA
