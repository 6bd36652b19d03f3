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
  const int64_t size = size_of(dtype);
  run(PseudoQuantize{in.const_data_ptr(), out.mutable_data_ptr(), dtype, w.size(0), w.size(1),
                     group, grid, past_caches(out, w.size(1) * size, group * size)},
      grain_for(w.size(1)));
  return out;
}

// In place: a fresh tensor of the size of w costs more in page faults than the arithmetic.
void pseudo_quantize_(Tensor w, int64_t bits, int64_t group_size, bool symmetric,
                      std::string scale_dtype) {
  check_matrix(w, "w", "[out_features, in_features]");
  const int64_t group = resolve_group(group_size, w.size(1));
  const Grid grid = make_grid(bits, symmetric, scale_dtype);
  const DType dtype = dtype_of(w, "w");
  check(w.is_contiguous(), "w must be contiguous: it is updated in place");
  void* data = w.mutable_data_ptr();
  run(PseudoQuantize{data, data, dtype, w.size(0), w.size(1), group, grid, false},
      grain_for(w.size(1)));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "pseudo_quantize(Tensor w, int bits, int group_size, bool symmetric, str scale_dtype)"
      " -> Tensor");
  m.def(
      "pseudo_quantize_(Tensor(a!) w, int bits, int group_size, bool symmetric, str scale_dtype)"
      " -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fewbit, CPU, m) {
  m.impl("pseudo_quantize", TORCH_BOX(&pseudo_quantize));
  m.impl("pseudo_quantize_", TORCH_BOX(&pseudo_quantize_));
}

}  // namespace fewbit::bindings
