#include "fewbit/int8_mixed_linear.h"

#include <algorithm>

#include "common.h"
#include "packed_linear.h"
#include "per_token_args.h"

namespace fewbit::bindings {

namespace {

// Calls each(column, index) for a list of columns.
template <class Each>
void each_column(const Tensor& list, const char* name, int64_t columns, const Each& each) {
  check_dtype(list, ScalarType::Long, name);
  check(list.dim() == 1, name, " must be a list of columns, got shape ", shape_of(list));
  const Tensor dense_list = dense(list);
  for (int64_t i = 0; i < list.size(0); ++i) {
    const int64_t k = data<int64_t>(dense_list)[i];
    check(k >= 0 && k < columns, name, " must hold columns in 0..", columns - 1, ", got ", k);
    each(k, i);
  }
}

}  // namespace

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
  const Scratch<uint8_t, Outlier, const float*, int8_t, float, int32_t> scratch(
      columns, columns, kept ? columns : 0, m * columns, m, m);
  uint8_t* flag = scratch.get<0>();
  std::fill_n(flag, columns, uint8_t(0));
  if (outliers)
    each_column(*outliers, "outliers", columns, [&](int64_t k, int64_t) { flag[k] = 1; });
  else if (m > 0)
    run(OutlierColumns{in.const_data_ptr(), flag, float(threshold), dtype, m, columns},
        grain_for(m * OutlierColumns::block));

  std::optional<Tensor> float_columns;
  const float** by_column = scratch.get<2>();
  if (kept) {
    check_shape(*kept_weight, {kept->numel(), l.rows}, "kept_weight");
    check_dtype(*kept_weight, ScalarType::Float, "kept_weight");
    float_columns = dense(*kept_weight);
    std::fill_n(by_column, columns, nullptr);
    each_column(*kept, "kept", columns, [&](int64_t k, int64_t i) {
      by_column[k] = data<float>(*float_columns) + i * l.rows;
    });
  }
  Outlier* outlier = scratch.get<1>();
  int64_t count = 0;
  for (int64_t k = 0; k < columns; ++k) {
    if (!flag[k]) continue;
    const int64_t g = k / l.group_size;
    const int64_t unit = g * l.group_units() + (k - g * l.group_size) / unit_columns(8);
    outlier[count++] = {k, g, unit * panel_rows, kept ? by_column[k] : nullptr};
  }

  Tensor out = empty({m, l.rows}, x.scalar_type());
  if (m == 0 || l.rows == 0) return out;
  std::optional<Scratch<float, float>> floats;
  if (count > 0) floats.emplace(m * count, m * l.panels() * panel_rows);
  const OutlierProduct product{floats ? floats->get<0>() : nullptr,
                               outlier,
                               data<uint32_t>(w.words),
                               w.scale.const_data_ptr(),
                               data<uint8_t>(w.zero_point),
                               floats ? floats->get<1>() : nullptr,
                               w.scale_dtype,
                               m,
                               count,
                               l};
  if (count > 0)
    run(OutlierGather{in.const_data_ptr(), outlier, floats->get<0>(), dtype, m, columns, count},
        grain_for(count));
  quantize_tokens(in, true, std::nullopt, std::nullopt, count > 0 ? flag : nullptr,
                  scratch.get<3>(), scratch.get<4>(), scratch.get<5>());
  run_integer({scratch.get<3>(), true, DType::f32, m, scratch.get<4>(), nullptr, nullptr}, w,
              count > 0 ? &product : nullptr, out.mutable_data_ptr(), dtype);
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
