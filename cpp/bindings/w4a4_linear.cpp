#include "fewbit/w4a4_linear.h"

#include "cuda_product.h"
#include "per_token_args.h"

namespace fewbit::bindings {

Tensor w4a4_linear(const Tensor& x, const Tensor& packed, const Tensor& scale,
                   const Tensor& zero_point, std::optional<Tensor> bias, int64_t out_features,
                   int64_t group_size, std::optional<Tensor> x_scale, std::optional<double> clip) {
  const bool words = x.scalar_type() == ScalarType::Int;
  check_matrix(x, "x", words ? "[tokens, in_features / 8]" : "[tokens, in_features]");
  const int64_t m = x.size(0), columns = words ? 8 * x.size(1) : x.size(1);
  const PackedLayout l = make_layout(out_features, columns, 4, group_size);
  const Weight w = make_weight(packed, scale, zero_point, bias, l);
  check_exact(l, true);
  check(words == bool(x_scale), "x_scale, one per token, comes with x of 4-bit codes (int32 words)",
        " and only there");
  check(!(words && clip), "clip belongs to float x; codes have their grid");
  const TokenGrid grid = token_grid(4, clip);
  const DType dtype = words ? DType::f32 : dtype_of(x, "x");
  const Tensor in = dense(x);
  std::optional<Tensor> scales;
  if (words) {
    check_dtype(*x_scale, ScalarType::Float, "x_scale");
    check_shape(*x_scale, {m}, "x_scale");
    scales = dense(*x_scale);
  }
  Tensor out = empty_on(x, {m, l.rows}, scalar_type(dtype));
  if (m == 0 || l.rows == 0) return out;
#if FEWBIT_WITH_CUDA
  if (const int card = architecture_of(x); card != 0) {
    cuda::PackedProduct a = product_of(in, w, dtype);
    a.codes = cuda::multiplies_fours(a, card) ? 4 : 8;
    Tensor q = in;
    if (!words || a.codes == 8)
      q = a.codes == 4 ? empty_on(x, {m, columns / 8}, ScalarType::Int)
                       : empty_on(x, {m, columns}, ScalarType::Char);
    a.x = q.const_data_ptr();
    if (!cuda::serves(a, card))
      return call<Tensor>("fewbit_plain::w4a4_linear", x, packed, scale, zero_point, bias,
                          out_features, group_size, x_scale, clip);
    if (!words) {
      scales = empty_on(x, {m}, ScalarType::Float);
      Tensor zero = empty_on(x, {m}, ScalarType::Int);
      quantize_tokens(in, grid, std::nullopt, std::nullopt, nullptr,
                      a.codes == 8 ? mutable_data<int8_t>(q) : nullptr,
                      mutable_data<float>(*scales), mutable_data<int32_t>(zero),
                      a.codes == 4 ? mutable_data<uint32_t>(q) : nullptr);
    } else if (a.codes == 8) {
      run_cuda(x, FoursOfWords{data<uint32_t>(in), mutable_data<int8_t>(q), m, columns},
               "w4a4_linear");
    }
    a.x_scale = data<float>(*scales);
    a.out = out.mutable_data_ptr();
    run_product(q, a, "w4a4_linear");
    return out;
  }
#endif
  const Scratch<int8_t, float, int32_t> scratch(m * columns, words ? 0 : m, m);
  int8_t* q = scratch.get<0>();
  float* q_scale = scratch.get<1>();
  if (words)
    run(FoursOfWords{data<uint32_t>(in), q, m, columns}, grain_for(columns));
  else
    quantize_tokens(in, grid, std::nullopt, std::nullopt, nullptr, q, q_scale, scratch.get<2>());
  run_integer({q, true, DType::f32, m, words ? data<float>(*scales) : q_scale, nullptr, nullptr}, w,
              nullptr, out.mutable_data_ptr(), dtype);
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "w4a4_linear(Tensor x, Tensor packed, Tensor scale, Tensor zero_point, Tensor? bias,"
      " int out_features, int group_size, Tensor? x_scale, float? clip) -> Tensor");
}
FEWBIT_OP(w4a4_linear)

}  // namespace fewbit::bindings
