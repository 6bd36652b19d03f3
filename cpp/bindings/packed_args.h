// The checks on packed weights that pack, unpack and the packed matrix products share.
#pragma once
#include "common.h"
#include "fewbit/layout.h"

namespace fewbit::bindings {

inline PackedLayout make_layout(int64_t rows, int64_t columns, int64_t bits, int64_t group_size) {
  check(packable(bits), "bits must be 2, 3, 4 or 8 to be packed, got ", bits);
  check(rows >= 0, "out_features must not be negative, got ", rows);
  check(columns >= 0, "in_features must not be negative, got ", columns);
  // Keeps every product of sizes in the layout far from 2^63.
  check(rows < (int64_t{1} << 40) && columns < (int64_t{1} << 40) &&
            (columns == 0 || rows <= (int64_t{1} << 48) / columns),
        "a weight of ", rows, " x ", columns, " is larger than 2^48 elements");
  return {rows, columns, resolve_group(group_size, columns), static_cast<int>(bits)};
}

inline void check_packed(const Tensor& packed, const Tensor& scale, const Tensor& zero_point,
                         const PackedLayout& l) {
  check_dtype(packed, ScalarType::Int, "packed");
  check_dtype(zero_point, ScalarType::Byte, "zero_point");
  dtype_of(scale, "scale");
  check(packed.dim() == 1 && packed.size(0) == l.words(), "packed must have shape [", l.words(),
        "] for ", l.rows, " x ", l.columns, " weights of ", l.bits, " bits in groups of ",
        l.group_size, ", got ", shape_of(packed));
  check_shape(scale, {l.panels(), l.groups(), panel_rows}, "scale");
  check_shape(zero_point, {l.panels(), l.groups(), panel_rows}, "zero_point");
}

}  // namespace fewbit::bindings
