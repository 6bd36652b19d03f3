#include "fewbit/pack.h"

#include "codes.h"

namespace fewbit::cpu::FEWBIT_ISA {

template <int bits>
static void pack_row(const uint8_t* q, const PackedLayout& l, uint32_t* out, uint32_t* all) {
  constexpr int columns = int(unit_columns(bits)), words = int(unit_words(bits) * panel_rows);
  for (int64_t g = 0; g < l.groups(); ++g) {
    const int64_t n = group_length(l, g);
    const uint8_t* from = q + group_start(l, g);
    uint32_t* unit = out + g * l.group_units() * words;
    int64_t k = 0;
    for (; k + columns <= n; k += columns, unit += words) {
      for (int i = 0; i < columns; i += 4) {
        uint32_t quad;
        __builtin_memcpy(&quad, from + k + i, 4);
        *all |= quad;
      }
      put_unit(unit, bits, from + k);
    }
    if (k < n) {
      uint8_t rest[32] = {};
      for (int64_t i = 0; k + i < n; ++i) {
        rest[i] = from[k + i];
        *all |= rest[i];
      }
      put_unit(unit, bits, rest);
    }
  }
}

void kernel(const Pack& a, int64_t begin, int64_t end) {
  const PackedLayout& l = a.layout;
  for (int64_t panel = begin; panel < end; ++panel) {
    uint32_t* out = a.packed + panel * l.panel_words();
    uint32_t all = 0;
    const int64_t first = panel * panel_rows;
    if (first + panel_rows > l.rows) __builtin_memset(out, 0, size_t(l.panel_words()) * 4);
    for (int64_t r = 0; r < panel_rows; ++r) {
      const int64_t row = first + r;
      for (int64_t g = 0; g < l.groups(); ++g) {
        const int64_t to = (panel * l.groups() + g) * panel_rows + r, from = row * l.groups() + g;
        a.panel_zero_point[to] = row < l.rows ? a.zero_point[from] : uint8_t(0);
        if (a.scale_bytes == 4)
          static_cast<uint32_t*>(a.panel_scale)[to] =
              row < l.rows ? static_cast<const uint32_t*>(a.scale)[from] : 0u;
        else
          static_cast<uint16_t*>(a.panel_scale)[to] =
              row < l.rows ? static_cast<const uint16_t*>(a.scale)[from] : uint16_t(0);
      }
      if (row >= l.rows) continue;
      const uint8_t* q = a.q + row * l.columns;
      switch (l.bits) {
        case 2: pack_row<2>(q, l, out + r, &all); break;
        case 3: pack_row<3>(q, l, out + r, &all); break;
        case 4: pack_row<4>(q, l, out + r, &all); break;
        case 8: pack_row<8>(q, l, out + r, &all); break;
      }
    }
    a.all[panel] = uint8_t(all | all >> 8 | all >> 16 | all >> 24);
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
