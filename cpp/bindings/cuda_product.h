// Packed matrix products of CUDA tensors: workspace, parts of k, and what no kernel serves.
#pragma once
#include <array>

#include "cuda.h"
#include "packed_linear.h"

#if FEWBIT_WITH_CUDA

namespace fewbit::bindings {

// The op's plain twin, for shapes and types without a kernel; `results` tensors.
template <int results = 1, class... Arguments>
auto call_plain(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  const auto tensor = [&](size_t i) { return torch::stable::detail::to<Tensor>(stack[i]); };
  if constexpr (results == 1)
    return tensor(0);
  else if constexpr (results == 2)
    return std::tuple<Tensor, Tensor>(tensor(0), tensor(1));
  else
    return std::tuple<Tensor, Tensor, Tensor>(tensor(0), tensor(1), tensor(2));
}

// What every product says of its weight.
inline cuda::PackedProduct product_of(const Tensor& x, const Weight& w, DType dtype) {
  check_beside(x, w.words, "packed");
  check_beside(x, w.scale, "scale");
  check_beside(x, w.zero_point, "zero_point");
  if (w.bias) check_beside(x, *w.bias, "bias");
  cuda::PackedProduct a{};
  a.x = x.const_data_ptr();
  a.packed = data<uint32_t>(w.words);
  a.scale = w.scale.const_data_ptr();
  a.zero_point = data<uint8_t>(w.zero_point);
  a.bias = w.bias_data();
  a.dtype = dtype;
  a.scale_dtype = w.scale_dtype;
  a.m = x.size(0);
  a.layout = w.layout;
  return a;
}

inline void run_product(const Tensor& on, cuda::PackedProduct a, const char* op) {
  const int card = architecture_of(on);
  a.blocks = cuda::blocks_for(a, card, cuda::processors(on.is_cuda() ? on.get_device_index() : 0));
  Tensor partial;
  if (const int64_t bytes = cuda::partial_bytes(a, card); bytes > 0) {
    partial = empty_on(on, {bytes / 4}, ScalarType::Float);
    a.partial = partial.mutable_data_ptr();
  }
  run_cuda(on, a, op);
}

}  // namespace fewbit::bindings

#endif
