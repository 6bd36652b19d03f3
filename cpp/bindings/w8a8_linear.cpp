#include "fewbit/w8a8_linear.h"

#include "cuda_product.h"
#include "per_token_args.h"

namespace fewbit::bindings {

Tensor w8a8_linear(const Tensor& x, const Tensor& packed, const Tensor& scale,
                   const Tensor& zero_point, std::optional<Tensor> bias, int64_t out_features,
                   int64_t bits, int64_t group_size, bool symmetric, std::optional<Tensor> x_scale,
                   std::optional<Tensor> x_zero_point, std::optional<Tensor> code_sum) {
  check_matrix(x, "x", "[tokens, in_features]");
  const int64_t m = x.size(0), columns = x.size(1);
  const PackedLayout l = make_layout(out_features, columns, bits, group_size);
  const Weight w = make_weight(packed, scale, zero_point, bias, l);
  check_exact(l, symmetric);
  check(symmetric || code_sum, "symmetric=False needs code_sum: the sums of centred codes");
  if (code_sum) {
    check_dtype(*code_sum, ScalarType::Int, "code_sum");
    check_shape(*code_sum, {l.panels(), l.groups(), panel_rows}, "code_sum");
  }
  const bool codes = x.scalar_type() == ScalarType::Char;
  const DType dtype = codes ? DType::f32 : dtype_of(x, "x");
  const Tensor in = dense(x);
  std::optional<Tensor> sums, scales, zeros, codes_on_card;
  if (!symmetric) sums = dense(*code_sum);
  Activations t{in.const_data_ptr(),
                true,
                DType::f32,
                m,
                nullptr,
                nullptr,
                sums ? data<int32_t>(*sums) : nullptr};
#if FEWBIT_WITH_CUDA
  const int card = architecture_of(x);
#else
  constexpr int card = 0;
#endif
  // Codes of float x: in scratch, or beside x on a card.
  const bool local = !codes && card == 0;
  const IntegerScratch<> scratch = integer_scratch(l, card == 0 ? m : 0, true, local);
  if (codes) {
    check(bool(x_scale), "x of int8 codes needs x_scale, one per token");
    check_dtype(*x_scale, ScalarType::Float, "x_scale");
    check_shape(*x_scale, {m}, "x_scale");
    check(symmetric || bool(x_zero_point),
          "x of int8 codes with symmetric=False needs x_zero_point, one per token");
    scales = dense(*x_scale);
    t.scale = data<float>(*scales);
    if (!symmetric) {
      check_dtype(*x_zero_point, ScalarType::Int, "x_zero_point");
      check_shape(*x_zero_point, {m}, "x_zero_point");
      zeros = dense(*x_zero_point);
      t.zero = data<int32_t>(*zeros);
    }
  } else {
    int8_t* q = scratch.get<3>();
    float* q_scale = scratch.get<4>();
    int32_t* q_zero = scratch.get<5>();
    if (!local) {
      codes_on_card = empty_on(x, {m, columns}, ScalarType::Char);
      scales = empty_on(x, {m}, ScalarType::Float);
      zeros = empty_on(x, {m}, ScalarType::Int);
      q = mutable_data<int8_t>(*codes_on_card);
      q_scale = mutable_data<float>(*scales);
      q_zero = mutable_data<int32_t>(*zeros);
    }
    quantize_tokens(in, {symmetric}, x_scale, x_zero_point, nullptr, q, q_scale, q_zero);
    t.x = q;
    t.scale = q_scale;
    t.zero = symmetric ? nullptr : q_zero;
  }
  Tensor out = empty_on(x, {m, l.rows}, scalar_type(dtype));
  if (m == 0 || l.rows == 0) return out;
#if FEWBIT_WITH_CUDA
  if (card != 0) {
    cuda::PackedProduct a = product_of(in, w, dtype);
    a.codes = 8;
    a.x = t.x;
    a.x_scale = t.scale;
    a.x_zero = t.zero;
    a.code_sum = t.code_sum;
    a.out = out.mutable_data_ptr();
    if (!cuda::serves(a, card))
      return call<Tensor>("fewbit_plain::w8a8_linear", x, packed, scale, zero_point, bias,
                          out_features, bits, group_size, symmetric, x_scale, x_zero_point,
                          code_sum);
    run_product(in, a, "w8a8_linear");
    return out;
  }
#endif
  run_integer(t, w, scratch, nullptr, out.mutable_data_ptr(), dtype);
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "w8a8_linear(Tensor x, Tensor packed, Tensor scale, Tensor zero_point, Tensor? bias,"
      " int out_features, int bits, int group_size, bool symmetric, Tensor? x_scale,"
      " Tensor? x_zero_point, Tensor? code_sum) -> Tensor");
}
FEWBIT_OP(w8a8_linear)

}  // namespace fewbit::bindings
