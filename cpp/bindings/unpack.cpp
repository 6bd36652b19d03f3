#include "fewbit/unpack.h"

#include "cuda.h"
#include "packed_args.h"

namespace fewbit::bindings {

std::tuple<Tensor, Tensor, Tensor> unpack(const Tensor& packed, const Tensor& scale,
                                          const Tensor& zero_point, int64_t out_features,
                                          int64_t in_features, int64_t bits, int64_t group_size) {
  const PackedLayout l = make_layout(out_features, in_features, bits, group_size);
  check_packed(packed, scale, zero_point, l);
  const DType scale_dtype = dtype_of(scale, "scale");
  const Tensor words = dense(packed), scales = dense(scale);
  const Tensor zeros = dense(zero_point);
  Tensor q = empty_on(packed, {l.rows, l.columns}, ScalarType::Byte);
  Tensor row_scale = empty_on(packed, {l.rows, l.groups()}, scalar_type(scale_dtype));
  Tensor row_zero = empty_on(packed, {l.rows, l.groups()}, ScalarType::Byte);
  run_on(packed,
         Unpack{data<uint32_t>(words), scales.const_data_ptr(), data<uint8_t>(zeros),
                mutable_data<uint8_t>(q), row_scale.mutable_data_ptr(),
                mutable_data<uint8_t>(row_zero), static_cast<int>(size_of(scale_dtype)),
                past_caches(q, l.columns, l.group_size), l},
         "unpack", grain_for(l.columns * panel_rows));
  return {q, row_scale, row_zero};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "unpack(Tensor packed, Tensor scale, Tensor zero_point, int out_features, int in_features,"
      " int bits, int group_size) -> (Tensor q, Tensor scale, Tensor zero_point)");
}
FEWBIT_OP(unpack)

}  // namespace fewbit::bindings
