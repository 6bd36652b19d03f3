#include "fewbit/int8_mixed_linear.h"

#include <algorithm>
#include <cstring>

#include "cuda_product.h"
#include "per_token_args.h"

namespace fewbit::bindings {

namespace {

void check_list(const Tensor& list, const char* name) {
  check_dtype(list, ScalarType::Long, name);
  check(list.dim() == 1, name, " must be a list of columns, got shape ", shape_of(list));
}

// Calls each(column, index) for a list of columns.
template <class Each>
void each_column(const Tensor& list, const char* name, int64_t columns, const Each& each) {
  const Tensor dense_list = dense(list);
  for (int64_t i = 0; i < list.size(0); ++i) {
    const int64_t k = data<int64_t>(dense_list)[i];
    check(k >= 0 && k < columns, name, " must hold columns in 0..", columns - 1, ", got ", k);
    each(k, i);
  }
}

}  // namespace

#if FEWBIT_WITH_CUDA
// The list of outliers never leaves the card, so that nothing waits for it: columns out of range
// are passed over, and the float product runs over however many there are.
static Tensor mixed_on_cuda(const Tensor& x, const Weight& w, cuda::PackedProduct a,
                            float threshold, const std::optional<Tensor>& outliers,
                            const std::optional<Tensor>& kept,
                            const std::optional<Tensor>& kept_weight) {
  const PackedLayout& l = w.layout;
  Tensor flag = empty_on(x, {l.columns}, ScalarType::Byte);
  if (outliers) {
    const Tensor list = dense(*outliers);
    run_cuda(x,
             cuda::ColumnPlaces{data<int64_t>(list), nullptr, mutable_data<uint8_t>(flag),
                                list.size(0), l.columns},
             "int8_mixed_linear");
  } else {
    run_cuda(x,
             OutlierColumns{x.const_data_ptr(), mutable_data<uint8_t>(flag), threshold, a.dtype,
                            a.m, l.columns},
             "int8_mixed_linear");
  }
  std::optional<Tensor> kept_row, float_columns;
  if (kept) {
    const Tensor list = dense(*kept);
    float_columns = dense(*kept_weight);
    kept_row = empty_on(x, {l.columns}, ScalarType::Int);
    run_cuda(x,
             cuda::ColumnPlaces{data<int64_t>(list), mutable_data<int32_t>(*kept_row), nullptr,
                                list.size(0), l.columns},
             "int8_mixed_linear");
  }
  Tensor list = empty_on(x, {1 + l.columns}, ScalarType::Int);
  Tensor add = empty_on(x, {a.m, l.rows}, ScalarType::Float);
  run_cuda(x,
           cuda::OutlierProductRows{
               x.const_data_ptr(), data<uint8_t>(flag), mutable_data<int32_t>(list),
               kept ? data<int32_t>(*kept_row) : nullptr,
               kept ? data<float>(*float_columns) : nullptr, a.packed, a.scale, a.zero_point,
               mutable_data<float>(add), a.dtype, a.scale_dtype, a.m, l},
           "int8_mixed_linear");
  Tensor q = empty_on(x, {a.m, l.columns}, ScalarType::Char);
  Tensor q_scale = empty_on(x, {a.m}, ScalarType::Float);
  Tensor q_zero = empty_on(x, {a.m}, ScalarType::Int);
  quantize_tokens(x, {true}, std::nullopt, std::nullopt, data<uint8_t>(flag),
                  mutable_data<int8_t>(q), mutable_data<float>(q_scale),
                  mutable_data<int32_t>(q_zero));
  Tensor out = empty_on(x, {a.m, l.rows}, x.scalar_type());
  a.x = q.const_data_ptr();
  a.x_scale = data<float>(q_scale);
  a.add = data<float>(add);
  a.out = out.mutable_data_ptr();
  run_product(x, a, "int8_mixed_linear");
  return out;
}
#endif

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
  if (outliers) check_list(*outliers, "outliers");
  if (kept) {
    check_list(*kept, "kept");
    check_shape(*kept_weight, {kept->numel(), l.rows}, "kept_weight");
    check_dtype(*kept_weight, ScalarType::Float, "kept_weight");
  }
  end_of_checks();

  const Tensor in = dense(x);
#if FEWBIT_WITH_CUDA
  if (const int card = architecture_of(x); card != 0) {
    cuda::PackedProduct a = product_of(in, w, dtype);
    a.codes = 8;
    if (m == 0 || l.rows == 0 || !cuda::serves(a, card))
      return call<Tensor>("fewbit_plain::int8_mixed_linear", x, packed, scale, zero_point, bias,
                          out_features, group_size, threshold, outliers, kept, kept_weight);
    return mixed_on_cuda(in, w, a, float(threshold), outliers, kept, kept_weight);
  }
#endif
  const auto scratch = integer_scratch<uint8_t, Outlier, const float*>(l, m, true, true, columns,
                                                                       columns, kept ? columns : 0);
  uint8_t* flag = scratch.get<7>();
  std::fill_n(flag, columns, uint8_t(0));
  if (outliers)
    each_column(*outliers, "outliers", columns, [&](int64_t k, int64_t) { flag[k] = 1; });
  else if (m > 0)
    run(OutlierColumns{in.const_data_ptr(), flag, float(threshold), dtype, m, columns},
        grain_for(m * OutlierColumns::block));

  std::optional<Tensor> float_columns;
  const float** by_column = scratch.get<9>();
  if (kept) {
    float_columns = dense(*kept_weight);
    std::fill_n(by_column, columns, nullptr);
    each_column(*kept, "kept", columns, [&](int64_t k, int64_t i) {
      by_column[k] = data<float>(*float_columns) + i * l.rows;
    });
  }
  Outlier* outlier = scratch.get<8>();
  int64_t count = 0;
  const auto next = [&](int64_t k) -> int64_t {
    const void* found = std::memchr(flag + k, 1, size_t(columns - k));
    return found ? static_cast<const uint8_t*>(found) - flag : columns;
  };
  for (int64_t k = next(0); k < columns; k = next(k + 1)) {
    const int64_t g = k / l.group_size;
    const int64_t in_group = k - g * l.group_size;
    const int64_t unit = g * l.group_units() + in_group / unit_columns(8);
    outlier[count++] = {k, g, unit * panel_rows, int(8 * (in_group % unit_columns(8))),
                        kept ? by_column[k] : nullptr};
  }

  Tensor out = empty({m, l.rows}, x.scalar_type());
  if (m == 0 || l.rows == 0) return out;
  std::optional<Scratch<float, float>> floats;
  // Tiles are finished with their outliers at hand: those of a few rows and panels at a time.
  const int64_t window = multiplies_tiles(l, m, true) ? 0 : m;
  if (count > 0) floats.emplace(m * count, window * l.panels() * panel_rows);
  const OutlierProduct product{floats ? floats->get<0>() : nullptr,
                               outlier,
                               data<uint32_t>(w.words),
                               w.scale.const_data_ptr(),
                               data<uint8_t>(w.zero_point),
                               floats ? floats->get<1>() : nullptr,
                               w.scale_dtype,
                               0,
                               0,
                               window,
                               0,
                               m,
                               count,
                               l,
                               l.groups(),
                               l.panel_words()};
  if (count > 0)
    run(OutlierGather{in.const_data_ptr(), outlier, floats->get<0>(), dtype, m, columns, count},
        grain_for(count));
  quantize_tokens(in, {true}, std::nullopt, std::nullopt, count > 0 ? flag : nullptr,
                  scratch.get<3>(), scratch.get<4>(), scratch.get<5>());
  run_integer({scratch.get<3>(), true, DType::f32, m, scratch.get<4>(), nullptr, nullptr}, w,
              scratch, count > 0 ? &product : nullptr, out.mutable_data_ptr(), dtype);
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "int8_mixed_linear(Tensor x, Tensor packed, Tensor scale, Tensor zero_point, Tensor? bias,"
      " int out_features, int group_size, float threshold, Tensor? outliers, Tensor? kept,"
      " Tensor? kept_weight) -> Tensor");
}
FEWBIT_OP(int8_mixed_linear)

}  // namespace fewbit::bindings
