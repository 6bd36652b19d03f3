#include "fewbit/scaled_error.h"

#include "cuda.h"
#include "grid_args.h"

namespace fewbit::bindings {

Tensor scaled_error(const Tensor& w, const Tensor& scale, int64_t bits, int64_t group_size,
                    bool symmetric, std::string scale_dtype) {
  check_matrix(w, "w", "[out_features, in_features]");
  const int64_t rows = w.size(0), columns = w.size(1);
  const int64_t group = resolve_group(group_size, columns);
  const Grid grid = make_grid(bits, symmetric, scale_dtype);
  const DType dtype = dtype_of(w, "w");
  check_matrix(scale, "scale", "[candidates, in_features]");
  check_shape(scale, {scale.size(0), columns}, "scale");
  check_dtype(scale, ScalarType::Float, "scale");
  const int64_t count = scale.size(0);
  const Tensor in = dense(w), by = dense(scale);
  Tensor error = empty_on(w, {count, rows, columns}, w.scalar_type());
  run_on(w,
         ScaledError{in.const_data_ptr(), data<float>(by), error.mutable_data_ptr(), dtype, count,
                     rows, columns, group, grid},
         "scaled_error", grain_for(count * columns));
  return error;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "scaled_error(Tensor w, Tensor scale, int bits, int group_size, bool symmetric,"
      " str scale_dtype) -> Tensor");
}
FEWBIT_OP(scaled_error)

}  // namespace fewbit::bindings
