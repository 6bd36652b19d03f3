#include "cuda.h"
#include "per_token_args.h"

namespace fewbit::bindings {

std::tuple<Tensor, Tensor, Tensor> quantize_per_token(const Tensor& x, bool symmetric,
                                                      std::optional<Tensor> x_scale,
                                                      std::optional<Tensor> x_zero_point) {
  check_matrix(x, "x", "[tokens, channels]");
  const int64_t m = x.size(0), columns = x.size(1);
  Tensor q = empty_on(x, {m, columns}, ScalarType::Char);
  Tensor scale = empty_on(x, {m}, ScalarType::Float);
  Tensor zero_point = empty_on(x, {m}, ScalarType::Int);
  quantize_tokens(x, {symmetric}, x_scale, x_zero_point, nullptr, mutable_data<int8_t>(q),
                  mutable_data<float>(scale), mutable_data<int32_t>(zero_point), nullptr,
                  past_caches(q, columns, resolve_group(-1, columns)));
  return {q, scale, zero_point};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "quantize_per_token(Tensor x, bool symmetric, Tensor? x_scale, Tensor? x_zero_point)"
      " -> (Tensor q, Tensor scale, Tensor zero_point)");
}
FEWBIT_OP(quantize_per_token)

}  // namespace fewbit::bindings
