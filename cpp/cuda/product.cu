// Which kernel a packed product takes, and the sum of its parts.
#include "gemv.h"

namespace fewbit::cuda {

template <class X, int bits, int tiles, int level>
__global__ void __launch_bounds__(product_threads) product(PackedProduct a) {
  if constexpr (compiled<level>) product_block<X, bits, tiles, level>(a);
}

template <class X, int bits, int m>
__global__ void __launch_bounds__(gemv_threads, 2) gemv(PackedProduct a) {
  gemv_block<X, bits, m>(a);
}

// out = the parts of k in order, scaled, with what is to be added.
__global__ void sum_parts(PackedProduct a) {
  const int64_t at = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (at >= a.m * a.layout.rows) return;
  const int64_t row = at / a.layout.rows, n = at % a.layout.rows;
  const int64_t width = a.layout.panels() * panel_rows, from = row * width + n;
  float sum = 0.0f;
  if (a.codes) {
    int32_t exact = 0;
    for (int i = 0; i < a.splits; ++i)
      exact += static_cast<const int32_t*>(a.partial)[i * a.m * width + from];
    sum = float(exact) * load_scale(a.scale, a.scale_dtype, n);  // panels of one group: row n
  } else {
    for (int i = 0; i < a.splits; ++i)
      sum += static_cast<const float*>(a.partial)[i * a.m * width + from];
  }
  put(a, finish(a, sum, row, n), at);
}

namespace {

template <class F>
const char* with_bits(int bits, const F& f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    default: return f(std::integral_constant<int, 8>());
  }
}

template <class X, int bits, int tiles, int level>
const char* start_product(const PackedProduct& a, Place place) {
  using S = Shape<X, bits, tiles, level>;
  const dim3 grid(unsigned(ceil_div(a.layout.panels(), 2 * product_warps)),
                  unsigned(ceil_div(a.m, S::rows)), unsigned(a.splits));
  return start(&product<X, bits, tiles, level>, grid, product_threads, S::shared_bytes, place, a);
}

template <class X, int bits>
const char* start_tiles(const PackedProduct& a, Place place) {
  const bool many = a.m > 16;  // two tiles of rows share the decoded weights
  if (place.architecture >= 80)
    return many ? start_product<X, bits, 2, 80>(a, place) : start_product<X, bits, 1, 80>(a, place);
  if constexpr (std::is_same_v<X, BFloat16>)
    return "no tensor-core product of bfloat16 below sm_80";
  else if constexpr (std::is_same_v<X, int8_t> && bits == 3)
    return start_product<X, bits, 1, 75>(a, place);  // two tiles take more registers than there are
  else
    return many ? start_product<X, bits, 2, 75>(a, place) : start_product<X, bits, 1, 75>(a, place);
}

template <class X, int bits>
const char* start_gemv(const PackedProduct& a, Place place) {
  const dim3 grid(unsigned(ceil_div(a.layout.panels(), 2)), 1, unsigned(a.splits));
  switch (a.m) {
    case 1: return start(&gemv<X, bits, 1>, grid, gemv_threads, 0, place, a);
    case 2: return start(&gemv<X, bits, 2>, grid, gemv_threads, 0, place, a);
    case 3: return start(&gemv<X, bits, 3>, grid, gemv_threads, 0, place, a);
    default: return start(&gemv<X, bits, 4>, grid, gemv_threads, 0, place, a);
  }
}

bool on_cuda_cores(const PackedProduct& a) { return !a.codes && a.m <= few_rows; }

int64_t step_of(int bits) { return bits == 8 ? 32 : 4 * unit_columns(bits); }

}  // namespace

bool serves(const PackedProduct& a, int architecture) {
  const PackedLayout& l = a.layout;
  const int64_t step = step_of(l.bits);
  if (l.columns == 0 || l.columns % step != 0 || l.group_size % step != 0) return false;
  for (const void* p :
       {a.x, a.scale, static_cast<const void*>(a.packed), static_cast<const void*>(a.zero_point)})
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  if (on_cuda_cores(a) || a.codes) return true;
  return a.dtype == DType::f16 || (a.dtype == DType::bf16 && architecture >= 80);
}

int splits_for(const PackedProduct& a, int processors) {
  if (a.codes && a.layout.groups() > 1) return 1;  // groups are added in order
  const bool few = on_cuda_cores(a);
  const int64_t blocks =
      few ? ceil_div(a.layout.panels(), 2)
          : ceil_div(a.layout.panels(), 2 * product_warps) * ceil_div(a.m, a.m > 16 ? 32 : 16);
  // A part should be worth its start: for a block of the few, a step per warp and some more.
  const int64_t steps = a.layout.columns / step_of(a.layout.bits);
  const int64_t most = few ? steps / (2 * gemv_warps) : steps / 8;
  const int64_t wanted = 2 * int64_t(processors) / blocks;
  const int64_t splits = wanted < most ? wanted : most;
  return int(splits < 1 ? 1 : splits < 32 ? splits : 32);
}

const char* launch(const PackedProduct& a, Place place) {
  const char* error = with_bits(a.layout.bits, [&](auto bits) {
    constexpr int b = decltype(bits)::value;
    if (a.codes) return start_tiles<int8_t, b>(a, place);
    if (on_cuda_cores(a))
      return with_type(
          a.dtype, [&](auto* type) { return start_gemv<element<decltype(type)>, b>(a, place); });
    return a.dtype == DType::f16 ? start_tiles<Half, b>(a, place)
                                 : start_tiles<BFloat16, b>(a, place);
  });
  if (error != nullptr || a.splits == 1) return error;
  const int64_t blocks = ceil_div(a.m * a.layout.rows, 256);
  return start(&sum_parts, dim3(unsigned(blocks)), 256, 0, place, a);
}

}  // namespace fewbit::cuda
