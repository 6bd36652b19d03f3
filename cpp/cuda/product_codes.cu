#include "choice.h"

namespace fewbit::cuda {

template <class X, int bits>
Choice choose_tiles(const PackedProduct& a, int architecture) {
  // More tiles of rows share what is loaded and decoded, as far as registers go: with one scale a
  // row there is one set of sums to keep, else two.
  if constexpr (std::is_same_v<X, Int4> || (std::is_same_v<X, int8_t> && bits >= 4))
    if (a.m > 32 && a.layout.groups() == 1) return choose_level<X, bits, 4, true>(a, architecture);
  if (a.m <= 16 || (std::is_same_v<X, int8_t> && bits == 3 && architecture < 80))
    return choose_level<X, bits, 1>(a, architecture);
  return choose_level<X, bits, 2>(a, architecture);
}

Choice choose_codes(const PackedProduct& a, int architecture) {
  if (a.codes == 4) return choose_tiles<Int4, 4>(a, architecture);
  return with_bits(a.layout.bits, [&](auto bits) {
    return choose_tiles<int8_t, decltype(bits)::value>(a, architecture);
  });
}

}  // namespace fewbit::cuda
