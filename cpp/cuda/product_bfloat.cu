#include "choice.h"

namespace fewbit::cuda {

Choice choose_bfloat(const PackedProduct& a) {
  return with_bits(a.layout.bits, [&](auto bits) {
    constexpr int b = decltype(bits)::value;
    return a.m > 16 ? choose_product<BFloat16, b, 2, 80, false>(a)
                    : choose_product<BFloat16, b, 1, 80, false>(a);
  });
}

}  // namespace fewbit::cuda
