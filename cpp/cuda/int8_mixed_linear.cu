#include "fewbit/int8_mixed_linear.h"
#include "product.h"

namespace fewbit::cuda {

constexpr int mixed_threads = 256;

// flag[k] = 1 where some |x[m, k]| reaches the threshold, or is not finite.
// A block has 32 columns, its warps take rows in turn, several under way at a time.
template <class T>
__global__ void __launch_bounds__(mixed_threads, 1) outlier_columns(OutlierColumns a) {
  constexpr int warps = mixed_threads / warp_size, ahead = 8;
  __shared__ uint8_t found[warps][warp_size];
  const int lane = int(threadIdx.x) % warp_size, warp = int(threadIdx.x) / warp_size;
  const int64_t k = int64_t(blockIdx.x) * warp_size + lane;
  bool out = false;
  for (int64_t m = warp; m < a.m && k < a.columns; m += warps * ahead) {
    float v[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i)
      v[i] = m + i * warps < a.m
                 ? to_float(static_cast<const T*>(a.x)[(m + i * warps) * a.columns + k])
                 : 0.0f;
#pragma unroll
    for (int i = 0; i < ahead; ++i) out |= !(abs_of(v[i]) < a.threshold);
  }
  found[warp][lane] = out ? 1 : 0;
  __syncthreads();
  if (warp != 0 || k >= a.columns) return;
  uint8_t any = 0;
#pragma unroll
  for (int w = 0; w < warps; ++w) any |= found[w][lane];
  a.flag[k] = any;
}

// The flagged columns in order, and how many: one block, a stretch of columns per thread. The count
// stays on the card, so nobody waits for it.
__global__ void __launch_bounds__(mixed_threads, 1) outlier_list(OutlierProductRows a) {
  __shared__ int before[mixed_threads];
  const int64_t each = ceil_div(a.layout.columns, mixed_threads);
  const int64_t first = int64_t(threadIdx.x) * each;
  const int64_t last = first + each < a.layout.columns ? first + each : a.layout.columns;
  int count = 0;
  for (int64_t k = first; k < last; ++k) count += a.flag[k];
  before[threadIdx.x] = count;
  __syncthreads();
  int at = 0;
  for (unsigned i = 0; i < threadIdx.x; ++i) at += before[i];
  for (int64_t k = first; k < last; ++k)
    if (a.flag[k]) a.list[1 + at++] = int32_t(k);
  if (threadIdx.x == mixed_threads - 1) a.list[0] = at;
}

// add[m, n] = sum over the listed columns, in order, of x[m, k] w[n, k], w kept or from its codes.
// A thread has one row of the weight and four rows of x.
constexpr int mixed_rows = 4;
template <class T>
__global__ void __launch_bounds__(mixed_threads, 1) outlier_product(OutlierProductRows a) {
  const PackedLayout& l = a.layout;
  const int64_t n = int64_t(blockIdx.y) * mixed_threads + threadIdx.x;
  if (n >= l.rows) return;
  const int64_t m0 = int64_t(blockIdx.x) * mixed_rows;
  const int64_t panel = n / panel_rows, r = n % panel_rows;
  const int count = a.list[0];
  float sum[mixed_rows] = {};
  for (int i = 0; i < count; ++i) {
    const int64_t k = a.list[1 + i], group = k / l.group_size;
    const int64_t unit = group * l.group_units() + (k - group * l.group_size) / 4;
    const int64_t at = (panel * l.groups() + group) * panel_rows + r;
    const int32_t kept = a.kept_row ? a.kept_row[k] : -1;
    float w;
    if (kept >= 0) {
      w = a.kept_weight[kept * l.rows + n];
    } else {
      const uint32_t word = a.packed[panel * l.panel_words() + unit * panel_rows + r];
      const int64_t byte = (k - group * l.group_size) % 4;
      w = (float(word >> 8 * byte & 0xFFu) - float(a.zero_point[at])) *
          load_scale(a.scale, a.scale_dtype, at);
    }
#pragma unroll
    for (int j = 0; j < mixed_rows; ++j)
      if (m0 + j < a.m)
        sum[j] = fmaf(to_float(static_cast<const T*>(a.x)[(m0 + j) * l.columns + k]), w, sum[j]);
  }
#pragma unroll
  for (int j = 0; j < mixed_rows; ++j)
    if (m0 + j < a.m) a.add[(m0 + j) * l.rows + n] = sum[j];
}

// row[column] = place of the column among the `count` given; -1 elsewhere. One block. A column out
// of range is passed over: to report it would wait for the card.
__global__ void __launch_bounds__(mixed_threads, 1) column_places(ColumnPlaces a) {
  for (int64_t k = threadIdx.x; k < a.columns; k += mixed_threads) {
    if (a.place) a.place[k] = -1;
    if (a.flag) a.flag[k] = 0;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < a.count; i += mixed_threads) {
    const int64_t k = a.column[i];
    if (k < 0 || k >= a.columns) continue;
    if (a.place) a.place[k] = int32_t(i);
    if (a.flag) a.flag[k] = 1;
  }
}

const char* launch(const OutlierColumns& a, Place place) {
  const dim3 grid(unsigned(ceil_div(a.columns, warp_size)));
  return with_type(a.dtype, [&](auto* type) {
    return start(&outlier_columns<element<decltype(type)>>, grid, mixed_threads, 0, place, a);
  });
}

const char* launch(const ColumnPlaces& a, Place place) {
  return start(&column_places, dim3(1), mixed_threads, 0, place, a);
}

const char* launch(const OutlierProductRows& a, Place place) {
  const char* error = start(&outlier_list, dim3(1), mixed_threads, 0, place, a);
  if (error != nullptr) return error;
  const dim3 grid(unsigned(ceil_div(a.m, mixed_rows)),  // x may be long
                  unsigned(ceil_div(a.layout.rows, mixed_threads)));
  return with_type(a.dtype, [&](auto* type) {
    return start(&outlier_product<element<decltype(type)>>, grid, mixed_threads, 0, place, a);
  });
}

}  // namespace fewbit::cuda
