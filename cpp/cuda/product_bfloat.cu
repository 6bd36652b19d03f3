#include "choice.h"

namespace fewbit::cuda {

Choice choose_bfloat(const PackedProduct& a) {
  return with_bits(a.layout.bits, [&](auto bits) {
    constexpr int b = decltype(bits)::value;
    if constexpr (b == 3)  // two tiles take more registers than there are
      return choose_product<BFloat16, b, 1, 80, false>(a);
    else
      return a.m > 16 ? choose_product<BFloat16, b, 2, 80, false>(a)
                      : choose_product<BFloat16, b, 1, 80, false>(a);
  });
}

}  // namespace fewbit::cuda
