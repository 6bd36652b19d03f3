#include "fewbit/pack.h"

#include "common.h"
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
  // A code past its range would spill into its neighbour.
  const uint8_t* code = data<uint8_t>(codes);
  uint8_t all = 0;
  for (int64_t i = 0, n = l.rows * l.columns; i < n; ++i) all |= code[i];
  check(all >> bits == 0, "q holds codes above ", (1 << bits) - 1, ", the largest of ", bits,
        " bits");

  Tensor packed = empty({l.words()}, ScalarType::Int);
  Tensor panel_scale = empty({l.panels(), l.groups(), panel_rows}, scalar_type(scale_dtype));
  Tensor panel_zero = empty({l.panels(), l.groups(), panel_rows}, ScalarType::Byte);
  run(Pack{code, scales.const_data_ptr(), data<uint8_t>(zeros), mutable_data<uint32_t>(packed),
           panel_scale.mutable_data_ptr(), mutable_data<uint8_t>(panel_zero),
           static_cast<int>(size_of(scale_dtype)), l},
      grain_for(l.columns * panel_rows));
  return {packed, panel_scale, panel_zero};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "pack(Tensor q, Tensor scale, Tensor zero_point, int bits, int group_size)"
      " -> (Tensor packed, Tensor scale, Tensor zero_point)");
}
STABLE_TORCH_LIBRARY_IMPL(fewbit, CPU, m) { m.impl("pack", TORCH_BOX(&pack)); }

}  // namespace fewbit::bindings
