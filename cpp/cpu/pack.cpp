#include "fewbit/pack.h"

#include "codes.h"

namespace fewbit::cpu::FEWBIT_ISA {

void kernel(const Pack& a, int64_t begin, int64_t end) {
  const PackedLayout& l = a.layout;
  const int64_t columns = unit_columns(l.bits), words = unit_words(l.bits) * panel_rows;
  for (int64_t panel = begin; panel < end; ++panel) {
    uint32_t* out = a.packed + panel * l.panel_words();
    __builtin_memset(out, 0, size_t(l.panel_words()) * 4);
    for (int64_t r = 0; r < panel_rows; ++r) {
      const int64_t row = panel * panel_rows + r;
      const bool real = row < l.rows;
      for (int64_t g = 0; g < l.groups(); ++g) {
        const int64_t at = (panel * l.groups() + g) * panel_rows + r;
        a.panel_zero_point[at] = real ? a.zero_point[row * l.groups() + g] : uint8_t(0);
        char* scale = static_cast<char*>(a.panel_scale) + at * a.scale_bytes;
        if (real)
          __builtin_memcpy(scale,
                           static_cast<const char*>(a.scale) + (row * l.groups() + g) * a.scale_bytes,
                           size_t(a.scale_bytes));
        else
          __builtin_memset(scale, 0, size_t(a.scale_bytes));
        if (!real) continue;
        const int64_t start = g * l.group_size;
        const int64_t n = start + l.group_size <= l.columns ? l.group_size : l.columns - start;
        const uint8_t* q = a.q + row * l.columns + start;
        uint32_t* unit = out + g * l.group_units() * words + r;
        for (int64_t k = 0; k < n; ++k)
          put_code(unit + k / columns * words, l.bits, int(k % columns), q[k]);
      }
    }
  }
}

}  // namespace fewbit::cpu::FEWBIT_ISA
