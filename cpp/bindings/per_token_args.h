// Running the per-token quantisation, for the ops that begin with it.
#pragma once
#include "common.h"
#include "fewbit/quantize_per_token.h"

namespace fewbit::bindings {

struct Tokens {
  Tensor q, scale, zero_point;  // int8 [m, columns], float32 [m], int32 [m]
};

// x_scale of one element makes the grid static; without it, it is fitted to every row.
inline Tokens quantize_tokens(const Tensor& x, bool symmetric, const std::optional<Tensor>& x_scale,
                              const std::optional<Tensor>& x_zero_point, const uint8_t* skip) {
  const DType dtype = dtype_of(x, "x");
  Tensor fixed_scale, fixed_zero;
  if (x_scale) {
    check(x_scale->numel() == 1, "a static x_scale must hold one element, got ", x_scale->numel());
    check_dtype(*x_scale, ScalarType::Float, "x_scale");
    fixed_scale = dense(*x_scale);
  }
  if (x_zero_point) {
    check(bool(x_scale) && !symmetric,
          "x_zero_point needs x_scale and symmetric=False: a dynamic zero point is computed");
    check(x_zero_point->numel() == 1, "a static x_zero_point must hold one element, got ",
          x_zero_point->numel());
    check_dtype(*x_zero_point, ScalarType::Int, "x_zero_point");
    fixed_zero = dense(*x_zero_point);
  }
  const int64_t m = x.size(0), columns = x.size(1);
  const Tensor in = dense(x);
  Tokens t{empty({m, columns}, ScalarType::Char), empty({m}, ScalarType::Float),
           empty({m}, ScalarType::Int)};
  run(QuantizePerToken{in.const_data_ptr(), skip, x_scale ? data<float>(fixed_scale) : nullptr,
                       x_zero_point ? data<int32_t>(fixed_zero) : nullptr,
                       mutable_data<int8_t>(t.q), mutable_data<float>(t.scale),
                       mutable_data<int32_t>(t.zero_point), dtype, symmetric, m, columns},
      grain_for(columns));
  return t;
}

}  // namespace fewbit::bindings
