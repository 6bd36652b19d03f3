#include "choice.h"

namespace fewbit::cuda {

Choice choose_half(const PackedProduct& a, int architecture) {
  return with_bits(a.layout.bits, [&](auto bits) {
    constexpr int b = decltype(bits)::value;
    // Two tiles of rows share what is decoded.
    return a.m > 16 ? choose_level<Half, b, 2>(a, architecture)
                    : choose_level<Half, b, 1>(a, architecture);
  });
}

}  // namespace fewbit::cuda
