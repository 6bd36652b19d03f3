#include "fewbit/pseudo_quantize.h"

#include "common.h"
#include "grid_args.h"

namespace fewbit::bindings {

Tensor pseudo_quantize(const Tensor& w, int64_t bits, int64_t group_size, bool symmetric,
                       std::string scale_dtype) {
  check_matrix(w, "w", "[out_features, in_features]");
  const int64_t group = resolve_group(group_size, w.size(1));
  const Grid grid = make_grid(bits, symmetric, scale_dtype);
  const DType dtype = dtype_of(w, "w");
  const Tensor in = dense(w);
  Tensor out = empty({w.size(0), w.size(1)}, w.scalar_type());
  run(PseudoQuantize{in.const_data_ptr(), out.mutable_data_ptr(), dtype, w.size(0), w.size(1),
                     group, grid},
      grain_for(w.size(1)));
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "pseudo_quantize(Tensor w, int bits, int group_size, bool symmetric, str scale_dtype)"
      " -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fewbit, CPU, m) {
  m.impl("pseudo_quantize", TORCH_BOX(&pseudo_quantize));
}

}  // namespace fewbit::bindings
