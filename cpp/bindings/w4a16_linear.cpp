#include "fewbit/w4a16_linear.h"

#include "common.h"
#include "packed_args.h"

namespace fewbit::bindings {

Tensor w4a16_linear(const Tensor& x, const Tensor& packed, const Tensor& scale,
                    const Tensor& zero_point, std::optional<Tensor> bias, int64_t out_features,
                    int64_t bits, int64_t group_size) {
  check_matrix(x, "x", "[tokens, in_features]");
  const int64_t m = x.size(0), columns = x.size(1);
  const DType dtype = dtype_of(x, "x");
  const PackedLayout l = make_layout(out_features, columns, bits, group_size);
  check_packed(packed, scale, zero_point, l);
  Tensor bias32;
  if (bias) {
    check_shape(*bias, {l.rows}, "bias");
    dtype_of(*bias, "bias");
    bias32 = dense(torch::stable::to(*bias, ScalarType::Float));
  }
  Tensor out = empty({m, l.rows}, x.scalar_type());
  if (m == 0 || l.rows == 0) return out;

  const bool direct = m <= direct_rows;
  const int64_t block_rows = ceil_div(m, ceil_div(m, max_block_rows));
  const int64_t blocks = ceil_div(m, block_rows);
  const Tensor in = dense(x);
  const Tensor words = dense(packed), scales = dense(scale);
  const Tensor zeros = dense(zero_point);
  Tensor prepared = empty({blocks, l.padded_columns(), block_rows}, ScalarType::Float);
  Tensor group_sum, sums;
  if (direct) group_sum = empty({m, l.groups()}, ScalarType::Float);
  else sums = empty({l.panels(), m, panel_rows}, ScalarType::Float);

  run(W4A16Prepare{in.const_data_ptr(), mutable_data<float>(prepared),
                   direct ? mutable_data<float>(group_sum) : nullptr, dtype, m, block_rows, l},
      grain_for(block_rows * columns));
  W4A16Linear args{data<float>(prepared), direct ? data<float>(group_sum) : nullptr,
                   data<uint32_t>(words), scales.const_data_ptr(), data<uint8_t>(zeros),
                   bias ? data<float>(bias32) : nullptr,
                   direct ? nullptr : mutable_data<float>(sums), out.mutable_data_ptr(), dtype,
                   dtype_of(scale, "scale"), m, block_rows, /*strip=*/direct ? 4 : 8, l};
  // Narrow weights: smaller strips, so that every thread has work.
  while (args.strip > 1 && args.tasks() < 4 * int64_t(torch::stable::get_num_threads()))
    args.strip /= 2;
  run(args, grain_for(m * columns * panel_rows * args.strip, 1 << 17));
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "w4a16_linear(Tensor x, Tensor packed, Tensor scale, Tensor zero_point, Tensor? bias,"
      " int out_features, int bits, int group_size) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fewbit, CPU, m) { m.impl("w4a16_linear", TORCH_BOX(&w4a16_linear)); }

}  // namespace fewbit::bindings
