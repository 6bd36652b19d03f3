#include "fewbit/norm_quantize.h"

#include "cuda.h"

namespace fewbit::bindings {

std::tuple<Tensor, Tensor, Tensor> norm_quantize(const Tensor& x, const Tensor& weight,
                                                 std::optional<Tensor> bias, double eps, bool rms,
                                                 bool symmetric) {
  check_matrix(x, "x", "[tokens, channels]");
  const int64_t m = x.size(0), columns = x.size(1);
  const DType dtype = dtype_of(x, "x");
  check_shape(weight, {columns}, "weight");
  dtype_of(weight, "weight");
  check(!(rms && bias), "an RMSNorm has no bias");
  if (bias) {
    check_shape(*bias, {columns}, "bias");
    dtype_of(*bias, "bias");
  }
  end_of_checks();
  const Tensor in = dense(x);
  const Tensor weight32 = as_float(weight);
  std::optional<Tensor> bias32;
  if (bias) bias32 = as_float(*bias);
  const Scratch<float> normed(x.is_cuda() ? 0 : m * columns);  // CUDA kernels need none
  Tensor q = empty_on(x, {m, columns}, ScalarType::Char);
  Tensor scale = empty_on(x, {m}, ScalarType::Float);
  Tensor zero_point = empty_on(x, {m}, ScalarType::Int);
  run_on(x,
         NormQuantize{
             in.const_data_ptr(), data<float>(weight32), bias ? data<float>(*bias32) : nullptr,
             normed.get<0>(), mutable_data<int8_t>(q), mutable_data<float>(scale),
             mutable_data<int32_t>(zero_point), float(eps), dtype, rms, symmetric, m, columns},
         "norm_quantize", grain_for(columns));
  return {q, scale, zero_point};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "norm_quantize(Tensor x, Tensor weight, Tensor? bias, float eps, bool rms, bool symmetric)"
      " -> (Tensor q, Tensor scale, Tensor zero_point)");
}
FEWBIT_OP(norm_quantize)

}  // namespace fewbit::bindings
