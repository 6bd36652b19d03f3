// The grid arguments that quantize and pseudo_quantize share.
#pragma once
#include "common.h"
#include "fewbit/grid.h"

namespace fewbit::bindings {

inline Grid make_grid(int64_t bits, bool symmetric, const std::string& scale_dtype) {
  check(bits >= 2 && bits <= 8, "bits must be in 2..8, got ", bits);
  return {static_cast<int>(bits), symmetric, dtype_named(scale_dtype, "scale_dtype")};
}

}  // namespace fewbit::bindings
