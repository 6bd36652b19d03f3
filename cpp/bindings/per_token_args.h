// Running the per-token quantisation, for the ops that begin with it.
#pragma once
#include "cuda.h"
#include "fewbit/quantize_per_token.h"

namespace fewbit::bindings {

// The clipped grid of 4 or 8 bits, or without clip the symmetric one.
inline TokenGrid token_grid(int64_t bits, const std::optional<double>& clip) {
  check(!clip || (*clip > 0.0 && *clip <= 1.0), "clip must be above 0 and at most 1, got ",
        clip ? *clip : 0.0);
  return {true, int(bits), clip ? float(*clip) : 0.0f};
}

// x_scale of one element makes the grid static; without it, it is fitted to every row. Writes q
// int8 [m, columns] (or `words`, with 4 bits), `past` the caches where no product follows, scale
// float32 [m] and zero_point int32 [m].
inline void quantize_tokens(const Tensor& x, TokenGrid grid, const std::optional<Tensor>& x_scale,
                            const std::optional<Tensor>& x_zero_point, const uint8_t* skip,
                            int8_t* q, float* scale, int32_t* zero_point, uint32_t* words = nullptr,
                            bool past = false) {
  const DType dtype = dtype_of(x, "x");
  std::optional<Tensor> fixed_scale, fixed_zero;
  if (x_scale) {
    check(x_scale->numel() == 1, "a static x_scale must hold one element, got ", x_scale->numel());
    check_dtype(*x_scale, ScalarType::Float, "x_scale");
    fixed_scale = dense(*x_scale);
  }
  if (x_zero_point) {
    check(bool(x_scale) && !grid.symmetric,
          "x_zero_point needs x_scale and symmetric=False: a dynamic zero point is computed");
    check(x_zero_point->numel() == 1, "a static x_zero_point must hold one element, got ",
          x_zero_point->numel());
    check_dtype(*x_zero_point, ScalarType::Int, "x_zero_point");
    fixed_zero = dense(*x_zero_point);
  }
  const int64_t m = x.size(0), columns = x.size(1);
  const Tensor in = dense(x);
  run_on(
      x,
      QuantizePerToken{in.const_data_ptr(), skip, fixed_scale ? data<float>(*fixed_scale) : nullptr,
                       fixed_zero ? data<int32_t>(*fixed_zero) : nullptr, q, scale, zero_point,
                       dtype, grid, m, columns, words, past},
      "quantize_per_token", grain_for(columns));
}

}  // namespace fewbit::bindings
