#include "fewbit/w4a16_linear.h"

#include "cuda_product.h"

namespace fewbit::bindings {

#if FEWBIT_WITH_CUDA
// Many rows: the weight in the type of x, once, then torch's own product.
static Tensor dequantized_linear(const Tensor& x, const Weight& w,
                                 const std::optional<Tensor>& bias) {
  const PackedLayout& l = w.layout;
  Tensor weight = empty_on(x, {l.rows, l.columns}, x.scalar_type());
  run_cuda(x,
           cuda::DensePacked{data<uint32_t>(w.words), w.scale.const_data_ptr(),
                             data<uint8_t>(w.zero_point), weight.mutable_data_ptr(),
                             dtype_of(x, "x"), w.scale_dtype, l},
           "w4a16_linear");
  std::optional<Tensor> b;
  if (bias) b = torch::stable::to(*bias, x.scalar_type());
  return call<Tensor>("aten::linear", x, weight, b);
}
#endif

Tensor w4a16_linear(const Tensor& x, const Tensor& packed, const Tensor& scale,
                    const Tensor& zero_point, std::optional<Tensor> bias, int64_t out_features,
                    int64_t bits, int64_t group_size) {
  check_matrix(x, "x", "[tokens, in_features]");
  const int64_t m = x.size(0), columns = x.size(1);
  const DType dtype = dtype_of(x, "x");
  const PackedLayout l = make_layout(out_features, columns, bits, group_size);
  const Weight w = make_weight(packed, scale, zero_point, bias, l);
  Tensor out = empty_on(x, {m, l.rows}, x.scalar_type());
  if (m == 0 || l.rows == 0) return out;
  const Tensor in = dense(x);
#if FEWBIT_WITH_CUDA
  if (const int card = architecture_of(x); card != 0) {
    cuda::PackedProduct a = product_of(in, w, dtype);
    if (!cuda::serves(a, card))
      return call<Tensor>("fewbit_plain::w4a16_linear", x, packed, scale, zero_point, bias,
                          out_features, bits, group_size);
    if (m > cuda::most_rows(card)) return dequantized_linear(in, w, bias);
    a.out = out.mutable_data_ptr();
    run_product(in, a, "w4a16_linear");
    return out;
  }
#endif
  if ((m <= fixed_rows || multiplies_tiles(l, m, false)) && l.group_size <= max_columns) {
    run_integer({in.const_data_ptr(), false, dtype, m, nullptr, nullptr, nullptr}, w, nullptr,
                out.mutable_data_ptr(), dtype);
    return out;
  }

  const bool direct = m <= direct_rows;
  const int64_t rows = float_block_rows(m), blocks = ceil_div(m, rows);
  // Sums: of x over a group, for the direct path; of products, for the other.
  const Scratch<float, float> scratch(
      blocks * l.padded_columns() * rows,
      direct ? m * l.groups() : l.panels() * blocks * rows * panel_rows);
  float *prepared = scratch.get<0>(), *sums = scratch.get<1>();
  run(W4A16Prepare{in.const_data_ptr(), prepared, direct ? sums : nullptr, dtype, m, rows, l},
      grain_for(rows * columns));
  const int64_t strip = strip_of(l, direct ? 4 : 8);
  run(W4A16Linear{prepared, direct ? sums : nullptr, data<uint32_t>(w.words),
                  w.scale.const_data_ptr(), data<uint8_t>(w.zero_point), w.bias_data(),
                  direct ? nullptr : sums, out.mutable_data_ptr(), dtype, w.scale_dtype, m, rows,
                  strip, l},
      grain_for(m * columns * panel_rows * strip, 1 << 17));
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "w4a16_linear(Tensor x, Tensor packed, Tensor scale, Tensor zero_point, Tensor? bias,"
      " int out_features, int bits, int group_size) -> Tensor");
}
FEWBIT_OP(w4a16_linear)

}  // namespace fewbit::bindings
