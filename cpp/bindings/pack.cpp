#include "fewbit/pack.h"

#include "cuda.h"
#include "packed_args.h"

namespace fewbit::bindings {

std::tuple<Tensor, Tensor, Tensor> pack(const Tensor& q, const Tensor& scale,
                                        const Tensor& zero_point, int64_t bits,
                                        int64_t group_size) {
  check_matrix(q, "q", "[out_features, in_features]");
  check_dtype(q, ScalarType::Byte, "q");
  check_dtype(zero_point, ScalarType::Byte, "zero_point");
  const DType scale_dtype = dtype_of(scale, "scale");
  const PackedLayout l = make_layout(q.size(0), q.size(1), bits, group_size);
  check_shape(scale, {l.rows, l.groups()}, "scale");
  check_shape(zero_point, {l.rows, l.groups()}, "zero_point");
  const Tensor codes = dense(q), scales = dense(scale), zeros = dense(zero_point);
  Tensor packed = empty_on(q, {l.words()}, ScalarType::Int);
  Tensor panel_scale = empty_on(q, {l.panels(), l.groups(), panel_rows}, scalar_type(scale_dtype));
  Tensor panel_zero = empty_on(q, {l.panels(), l.groups(), panel_rows}, ScalarType::Byte);
  Tensor all = empty_on(q, {l.panels()}, ScalarType::Byte);
  run_on(q,
         Pack{data<uint8_t>(codes), scales.const_data_ptr(), data<uint8_t>(zeros),
              mutable_data<uint32_t>(packed), panel_scale.mutable_data_ptr(),
              mutable_data<uint8_t>(panel_zero), mutable_data<uint8_t>(all),
              static_cast<int>(size_of(scale_dtype)), past_caches(packed, 64, 64), l},
         "pack", grain_for(l.columns * panel_rows));
  // A code past its range has spilled into its neighbour.
  if (all.is_cuda())
    all = torch::stable::to(all, torch::headeronly::DeviceType::CPU);  // waits for it
  uint8_t any = 0;
  for (int64_t p = 0; p < l.panels(); ++p) any |= data<uint8_t>(all)[p];
  check(any >> bits == 0, "q holds codes above ", (1 << bits) - 1, ", the largest of ", bits,
        " bits");
  return {packed, panel_scale, panel_zero};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "pack(Tensor q, Tensor scale, Tensor zero_point, int bits, int group_size)"
      " -> (Tensor packed, Tensor scale, Tensor zero_point)");
}
FEWBIT_OP(pack)

}  // namespace fewbit::bindings
