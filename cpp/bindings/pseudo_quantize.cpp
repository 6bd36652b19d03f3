#include "fewbit/pseudo_quantize.h"

#include "cuda.h"
#include "grid_args.h"

namespace fewbit::bindings {

Tensor pseudo_quantize(const Tensor& w, int64_t bits, int64_t group_size, bool symmetric,
                       std::string scale_dtype) {
  check_matrix(w, "w", "[out_features, in_features]");
  const int64_t group = resolve_group(group_size, w.size(1));
  const Grid grid = make_grid(bits, symmetric, scale_dtype);
  const DType dtype = dtype_of(w, "w");
  const Tensor in = dense(w);
  Tensor out = empty_on(w, {w.size(0), w.size(1)}, w.scalar_type());
  const int64_t size = size_of(dtype);
  run_on(w,
         PseudoQuantize{in.const_data_ptr(), out.mutable_data_ptr(), dtype, w.size(0), w.size(1),
                        group, grid, past_caches(out, w.size(1) * size, group * size)},
         "pseudo_quantize", grain_for(w.size(1)));
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
  run_on(w, PseudoQuantize{data, data, dtype, w.size(0), w.size(1), group, grid, false},
         "pseudo_quantize_", grain_for(w.size(1)));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "pseudo_quantize(Tensor w, int bits, int group_size, bool symmetric, str scale_dtype)"
      " -> Tensor");
  m.def(
      "pseudo_quantize_(Tensor(a!) w, int bits, int group_size, bool symmetric, str scale_dtype)"
      " -> ()");
}
FEWBIT_OP(pseudo_quantize)
FEWBIT_OP(pseudo_quantize_)

}  // namespace fewbit::bindings
