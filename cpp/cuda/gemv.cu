#include "choice.h"
#include "gemv.h"

namespace fewbit::cuda {

// Blocks that share a multiprocessor's registers: lanes with 16 columns and more need many of them.
template <int bits, int m>
constexpr int gemv_blocks = (bits == 2 || bits == 3) && m == 4 ? 1 : 2;

template <class X, int bits, int m>
__global__ void __launch_bounds__(gemv_threads, (gemv_blocks<bits, m>)) gemv(PackedProduct a) {
  gemv_block<X, bits, m>(a);
}

template <class X, int bits, int m>
Choice choose_gemv(const PackedProduct& a) {
  constexpr int slab = gemv_warps * Shape<X, bits, 1, 75>::step;
  return {&gemv<X, bits, m>, work_of(a, m, warp_rows, slab), gemv_threads, 0, 2};
}

template <class X, int bits>
Choice choose_gemv(const PackedProduct& a) {
  switch (a.m) {
    case 1: return choose_gemv<X, bits, 1>(a);
    case 2: return choose_gemv<X, bits, 2>(a);
    case 3: return choose_gemv<X, bits, 3>(a);
    default: return choose_gemv<X, bits, 4>(a);
  }
}

Choice choose_gemv(const PackedProduct& a) {
  return with_bits(a.layout.bits, [&](auto bits) {
    constexpr int b = decltype(bits)::value;  // half goes to tensor cores
    return a.dtype == DType::f32 ? choose_gemv<float, b>(a) : choose_gemv<BFloat16, b>(a);
  });
}

}  // namespace fewbit::cuda
