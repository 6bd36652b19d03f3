#include "fewbit/int8_mixed_linear.h"

#include <vector>

#include "common.h"
#include "packed_linear.h"
#include "per_token_args.h"

namespace fewbit::bindings {

Tensor int8_mixed_linear(const Tensor& x, const Tensor& packed, const Tensor& scale,
                         const Tensor& zero_point, std::optional<Tensor> bias, int64_t out_features,
                         int64_t group_size, double threshold, std::optional<Tensor> outliers,
                         std::optional<Tensor> kept, std::optional<Tensor> kept_weight) {
  check_matrix(x, "x", "[tokens, in_features]");
  const int64_t m = x.size(0), columns = x.size(1);
  const DType dtype = dtype_of(x, "x");
  const PackedLayout l = make_layout(out_features, columns, 8, group_size);
  const Weight w = make_weight(packed, scale, zero_point, bias, l);
  check_exact(l, true);
  check(threshold > 0, "threshold must be above 0, got ", threshold);
  check(bool(kept) == bool(kept_weight), "kept and kept_weight come together");

  const Tensor in = dense(x);
  std::vector<uint8_t> flag(size_t(columns), 0);
  const auto mark = [&](const Tensor& index, const char* name, const auto& each) {
    check_dtype(index, ScalarType::Long, name);
    check(index.dim() == 1, name, " must be a list of columns, got shape ", shape_of(index));
    const Tensor list = dense(index);
    for (int64_t i = 0; i < list.size(0); ++i) {
      const int64_t k = data<int64_t>(list)[i];
      check(k >= 0 && k < columns, name, " must hold columns in 0..", columns - 1, ", got ", k);
      each(k, i);
    }
  };
  if (outliers)
    mark(*outliers, "outliers", [&](int64_t k, int64_t) { flag[size_t(k)] = 1; });
  else if (m > 0)
    run(OutlierColumns{in.const_data_ptr(), flag.data(), float(threshold), dtype, m, columns},
        grain_for(m * OutlierColumns::block));
  std::vector<int64_t> column;
  for (int64_t k = 0; k < columns; ++k)
    if (flag[size_t(k)]) column.push_back(k);
  const int64_t count = int64_t(column.size());

  Tensor float_columns;
  std::vector<const float*> from(size_t(count), nullptr);
  if (kept) {
    check_shape(*kept_weight, {kept->numel(), l.rows}, "kept_weight");
    check_dtype(*kept_weight, ScalarType::Float, "kept_weight");
    float_columns = dense(*kept_weight);
    std::vector<const float*> by_column(size_t(columns), nullptr);
    mark(*kept, "kept", [&](int64_t k, int64_t i) {
      by_column[size_t(k)] = data<float>(float_columns) + i * l.rows;
    });
    for (int64_t i = 0; i < count; ++i) from[size_t(i)] = by_column[size_t(column[size_t(i)])];
  }

  Tensor out = empty({m, l.rows}, x.scalar_type());
  if (m == 0 || l.rows == 0) return out;
  Tensor product;
  if (count > 0) {
    Tensor x_columns = empty({m, count}, ScalarType::Float);
    run(OutlierGather{in.const_data_ptr(), column.data(), mutable_data<float>(x_columns), dtype, m,
                      columns, count},
        grain_for(count));
    product = empty({m, l.panels() * panel_rows}, ScalarType::Float);
    run(OutlierProduct{data<float>(x_columns), column.data(), from.data(), data<uint32_t>(w.words),
                       w.scale.const_data_ptr(), data<uint8_t>(w.zero_point),
                       mutable_data<float>(product), w.scale_dtype, m, count, l},
        grain_for(m * count * panel_rows));
  }
  const Tokens t =
      quantize_tokens(in, true, std::nullopt, std::nullopt, count > 0 ? flag.data() : nullptr);
  run_integer({t.q.const_data_ptr(), true, DType::f32, m, data<float>(t.scale), nullptr, nullptr},
              w, count > 0 ? data<float>(product) : nullptr, out.mutable_data_ptr(), dtype);
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "int8_mixed_linear(Tensor x, Tensor packed, Tensor scale, Tensor zero_point, Tensor? bias,"
      " int out_features, int group_size, float threshold, Tensor? outliers, Tensor? kept,"
      " Tensor? kept_weight) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fewbit, CPU, m) {
  m.impl("int8_mixed_linear", TORCH_BOX(&int8_mixed_linear));
}

}  // namespace fewbit::bindings
