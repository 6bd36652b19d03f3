// Which kernel a packed product takes. Kernels are compiled in files of their own, by what x is.
#pragma once
#include "product.h"

namespace fewbit::cuda {

// A kernel and how stream-K cuts the product for it.
struct Choice {
  void (*kernel)(PackedProduct);
  Work work;
  int threads, shared;
  int64_t least;  // pieces that are worth a block
};

Choice choose_gemv(const PackedProduct& a);
Choice choose_half(const PackedProduct& a, int architecture);
Choice choose_bfloat(const PackedProduct& a);  // from sm_80 on
Choice choose_codes(const PackedProduct& a, int architecture);

template <class F>
auto with_bits(int bits, const F& f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    default: return f(std::integral_constant<int, 8>());
  }
}

template <class X, int bits, int tiles, int level, bool single>
__global__ void __launch_bounds__(product_threads, 2) product(PackedProduct a) {
  if constexpr (compiled<X, level>) product_block<X, bits, tiles, level, single>(a);
}

template <class X, int bits, int tiles, int level, bool single>
Choice choose_product(const PackedProduct& a) {
  using S = Shape<X, bits, tiles, level>;
  return {&product<X, bits, tiles, level, single>, work_of(a, S::rows, product_columns, S::slab),
          product_threads, S::shared_bytes, S::long_slabs ? 2 : 4};
}

template <class X, int bits, int tiles, bool single = false>
Choice choose_level(const PackedProduct& a, int architecture) {
  return architecture >= 80 ? choose_product<X, bits, tiles, 80, single>(a)
                            : choose_product<X, bits, tiles, 75, single>(a);
}

}  // namespace fewbit::cuda
