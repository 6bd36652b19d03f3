#include "fewbit/dequantize.h"

#include "cuda.h"

namespace fewbit::bindings {

Tensor dequantize(const Tensor& q, const Tensor& scale, const Tensor& zero_point,
                  int64_t group_size, std::string dtype) {
  check_matrix(q, "q", "[out_features, in_features]");
  check_dtype(q, ScalarType::Byte, "q");
  check_dtype(zero_point, ScalarType::Byte, "zero_point");
  const int64_t rows = q.size(0), columns = q.size(1);
  const int64_t group = resolve_group(group_size, columns);
  const int64_t groups = count_groups(columns, group);
  check_shape(scale, {rows, groups}, "scale");
  check_shape(zero_point, {rows, groups}, "zero_point");
  dtype_of(scale, "scale");
  const DType type = dtype_named(dtype, "dtype");
  const Tensor in = dense(q), zeros = dense(zero_point);
  const Tensor scales = as_float(scale);
  Tensor out = empty_on(q, {rows, columns}, scalar_type(type));
  run_on(q,
         Dequantize{data<uint8_t>(in), data<float>(scales), data<uint8_t>(zeros),
                    out.mutable_data_ptr(), type, rows, columns, group, groups,
                    past_caches(out, columns * size_of(type), group * size_of(type))},
         "dequantize", grain_for(columns));
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "dequantize(Tensor q, Tensor scale, Tensor zero_point, int group_size, str dtype)"
      " -> Tensor");
}
FEWBIT_OP(dequantize)

}  // namespace fewbit::bindings
