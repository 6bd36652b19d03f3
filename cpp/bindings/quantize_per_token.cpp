#include "common.h"
#include "per_token_args.h"

namespace fewbit::bindings {

std::tuple<Tensor, Tensor, Tensor> quantize_per_token(const Tensor& x, bool symmetric,
                                                      std::optional<Tensor> x_scale,
                                                      std::optional<Tensor> x_zero_point) {
  check_matrix(x, "x", "[tokens, channels]");
  Tokens t = quantize_tokens(x, symmetric, x_scale, x_zero_point, nullptr);
  return {t.q, t.scale, t.zero_point};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "quantize_per_token(Tensor x, bool symmetric, Tensor? x_scale, Tensor? x_zero_point)"
      " -> (Tensor q, Tensor scale, Tensor zero_point)");
}
STABLE_TORCH_LIBRARY_IMPL(fewbit, CPU, m) {
  m.impl("quantize_per_token", TORCH_BOX(&quantize_per_token));
}

}  // namespace fewbit::bindings
