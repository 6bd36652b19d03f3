// Packed matrix products of CUDA tensors: workspace, parts of k, and what no kernel serves.
#pragma once
#include "cuda.h"
#include "packed_linear.h"

#if FEWBIT_WITH_CUDA

namespace fewbit::bindings {

// What every product says of its weight.
inline cuda::PackedProduct product_of(const Tensor& x, const Weight& w, DType dtype) {
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
