#include "fewbit/unpack.h"

#include "codes.h"

namespace fewbit::cpu::FEWBIT_ISA {

void kernel(const Unpack& a, int64_t begin, int64_t end) {
  const PackedLayout& l = a.layout;
  const int64_t columns = unit_columns(l.bits), words = unit_words(l.bits) * panel_rows;
  for (int64_t panel = begin; panel < end; ++panel) {
    const uint32_t* in = a.packed + panel * l.panel_words();
    for (int64_t r = 0; r < panel_rows && panel * panel_rows + r < l.rows; ++r) {
      const int64_t row = panel * panel_rows + r;
      for (int64_t g = 0; g < l.groups(); ++g) {
        const int64_t at = (panel * l.groups() + g) * panel_rows + r;
        a.zero_point[row * l.groups() + g] = a.panel_zero_point[at];
        __builtin_memcpy(static_cast<char*>(a.scale) + (row * l.groups() + g) * a.scale_bytes,
                         static_cast<const char*>(a.panel_scale) + at * a.scale_bytes,
                         size_t(a.scale_bytes));
        const int64_t start = g * l.group_size;
        const int64_t n = start + l.group_size <= l.columns ? l.group_size : l.columns - start;
        uint8_t* q = a.q + row * l.columns + start;
        const uint32_t* unit = in + g * l.group_units() * words + r;
        for (int64_t k = 0; k < n; ++k)
          q[k] = get_code(unit + k / columns * words, l.bits, int(k % columns));
      }
    }
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
