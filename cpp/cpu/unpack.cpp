#include "fewbit/unpack.h"

#include "codes.h"

namespace fewbit::cpu::FEWBIT_ISA {

template <int bits>
static void unpack_row(const uint32_t* in, const PackedLayout& l, uint8_t* q) {
  constexpr int columns = int(unit_columns(bits)), words = int(unit_words(bits) * panel_rows);
  for (int64_t g = 0; g < l.groups(); ++g) {
    const int64_t n = group_length(l, g);
    uint8_t* to = q + group_start(l, g);
    const uint32_t* unit = in + g * l.group_units() * words;
    int64_t k = 0;
    for (; k + columns <= n; k += columns, unit += words) get_unit(unit, bits, to + k);
    if (k < n) {
      uint8_t rest[32];
      get_unit(unit, bits, rest);
      for (int64_t i = 0; k + i < n; ++i) to[k + i] = rest[i];
    }
  }
}

void kernel(const Unpack& a, int64_t begin, int64_t end) {
  const PackedLayout& l = a.layout;
  for (int64_t panel = begin; panel < end; ++panel) {
    const uint32_t* in = a.packed + panel * l.panel_words();
    for (int64_t r = 0; r < panel_rows && panel * panel_rows + r < l.rows; ++r) {
      const int64_t row = panel * panel_rows + r;
      for (int64_t g = 0; g < l.groups(); ++g) {
        const int64_t from = (panel * l.groups() + g) * panel_rows + r, to = row * l.groups() + g;
        a.zero_point[to] = a.panel_zero_point[from];
        if (a.scale_bytes == 4)
          static_cast<uint32_t*>(a.scale)[to] = static_cast<const uint32_t*>(a.panel_scale)[from];
        else
          static_cast<uint16_t*>(a.scale)[to] = static_cast<const uint16_t*>(a.panel_scale)[from];
      }
      uint8_t* q = a.q + row * l.columns;
      switch (l.bits) {
        case 2: unpack_row<2>(in + r, l, q); break;
        case 3: unpack_row<3>(in + r, l, q); break;
        case 4: unpack_row<4>(in + r, l, q); break;
        case 8: unpack_row<8>(in + r, l, q); break;
      }
    }
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
