#include "fewbit/quantize.h"

#include "cuda.h"
#include "grid_args.h"

namespace fewbit::bindings {

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& w, int64_t bits, int64_t group_size,
                                            bool symmetric, std::string scale_dtype) {
  check_matrix(w, "w", "[out_features, in_features]");
  const int64_t rows = w.size(0), columns = w.size(1);
  const int64_t group = resolve_group(group_size, columns);
  const int64_t groups = count_groups(columns, group);
  const Grid grid = make_grid(bits, symmetric, scale_dtype);
  const DType dtype = dtype_of(w, "w");
  const Tensor in = dense(w);
  Tensor q = empty_on(w, {rows, columns}, ScalarType::Byte);
  Tensor scale = empty_on(w, {rows, groups}, ScalarType::Float);
  Tensor zero_point = empty_on(w, {rows, groups}, ScalarType::Byte);
  run_on(w,
         Quantize{in.const_data_ptr(), mutable_data<uint8_t>(q), mutable_data<float>(scale),
                  mutable_data<uint8_t>(zero_point), dtype, rows, columns, group, groups, grid,
                  past_caches(q, columns, group)},
         "quantize", grain_for(columns));
  if (grid.scale_dtype != DType::f32)  // exact: the kernel has rounded
    scale = torch::stable::to(scale, scalar_type(grid.scale_dtype));
  return {q, scale, zero_point};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "quantize(Tensor w, int bits, int group_size, bool symmetric, str scale_dtype)"
      " -> (Tensor q, Tensor scale, Tensor zero_point)");
}
FEWBIT_OP(quantize)

}  // namespace fewbit::bindings
