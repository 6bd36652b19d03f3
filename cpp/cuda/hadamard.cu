#include "fewbit/hadamard.h"
#include "mma.h"

namespace fewbit::cuda {

constexpr int max_radix = 4;  // butterflies of 2^4 values are done in registers

// Stages on strides first, 2 first, .. over the row, 2^radix values per thread. Sums are made in
// the order of the strides, as on the CPU: the result has the same bits.
template <int radix, class Get, class Put>
FEWBIT_DEVICE void butterfly_pass(int width, int first, const Get& get, const Put& put) {
  constexpr int count = 1 << radix;
  for (int i = int(threadIdx.x); i < width / count; i += int(blockDim.x)) {
    const int base = i / first * first * count + i % first;
    float v[count];
#pragma unroll
    for (int r = 0; r < count; ++r) v[r] = get(base + r * first);
#pragma unroll
    for (int half = 1; half < count; half *= 2)
#pragma unroll
      for (int r = 0; r < count; ++r)
        if ((r & half) == 0) {
          const float a = v[r], b = v[r + half];
          v[r] = a + b;
          v[r + half] = a - b;
        }
#pragma unroll
    for (int r = 0; r < count; ++r) put(base + r * first, v[r]);
  }
  __syncthreads();
}

template <class Get, class Put>
FEWBIT_DEVICE void butterflies(int radix, int width, int first, const Get& get, const Put& put) {
  switch (radix) {
    case 0: butterfly_pass<0>(width, first, get, put); break;
    case 1: butterfly_pass<1>(width, first, get, put); break;
    case 2: butterfly_pass<2>(width, first, get, put); break;
    case 3: butterfly_pass<3>(width, first, get, put); break;
    default: butterfly_pass<4>(width, first, get, put); break;
  }
}

FEWBIT_DEVICE float flip(float v, int8_t sign) { return sign < 0 ? -v : v; }

// Outputs o .. o + 3 of column c of the base: y = B^T z for z [m, n] in shared memory.
template <class Put>
FEWBIT_DEVICE void base_column(const HadamardRows& a, const float* z, int n, int o, int c,
                               const Put& put) {
  const int m = int(a.m);
  float sum[4] = {};
  const auto value = [&](int i) { return i < m ? z[shared_place(i * n + c)] : 0.0f; };
  if (a.signs_base && n >= Hadamard::lanes && m <= 1024) {  // four rows at a time, as on the CPU
    for (int i = 0; i < m; i += 4) {
      const float x[4] = {value(i), value(i + 1), value(i + 2), value(i + 3)};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (o + j >= m) continue;
        int8_t s[4];
#pragma unroll
        for (int r = 0; r < 4; ++r)
          s[r] = i + r < m ? a.signs_base[(i + r) * m + o + j] : int8_t(1);
        sum[j] += (flip(x[0], s[0]) + flip(x[1], s[1])) + (flip(x[2], s[2]) + flip(x[3], s[3]));
      }
    }
  } else {
    for (int i = 0; i < m; ++i) {
      const float x = value(i);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (o + j < m)
          sum[j] = fmaf(
              x, a.signs_base ? float(a.signs_base[i * m + o + j]) : a.base[i * m + o + j], sum[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (o + j < m) put((o + j) * n + c, sum[j]);
}

template <class T>
__global__ void hadamard(HadamardRows a) {
  const int n = 1 << a.k, width = int(a.m) << a.k;
  const T* x = static_cast<const T*>(a.x) + int64_t(blockIdx.x) * width;
  T* y = static_cast<T*>(a.y) + int64_t(blockIdx.x) * width;
  float* z = reinterpret_cast<float*>(dynamic_shared());
  const auto from_row = [&](int e) {
    const float v = to_float(x[e]);
    return a.signs ? flip(v, a.signs[e]) : v;
  };
  const auto get = [&](int e) { return z[shared_place(e)]; };
  const auto put = [&](int e, float v) { z[shared_place(e)] = v; };
  const auto to_row = [&](int e, float v) { from_float(v * a.scale, y + e); };
  const bool based = a.signs_base || a.base;
  int left = a.k, first = 1;
  do {
    const int radix = left < max_radix ? left : max_radix;
    const bool begins = left == a.k;
    left -= radix;
    if (begins && left == 0 && !based)
      butterflies(radix, width, first, from_row, to_row);
    else if (begins)
      butterflies(radix, width, first, from_row, put);
    else if (left == 0 && !based)
      butterflies(radix, width, first, get, to_row);
    else
      butterflies(radix, width, first, get, put);
    first <<= radix;
  } while (left > 0);
  if (!based) return;
  const int columns = (int(a.m) + 3) / 4 * n;
  for (int at = int(threadIdx.x); at < columns; at += int(blockDim.x))
    base_column(a, z, n, at / n * 4, at % n, to_row);
}

const char* launch(const HadamardRows& a, Place place) {
  const int64_t width = a.m << a.k;
  const size_t shared = size_t(hadamard_bytes(width));  // shared_place stays inside 128 values
  return with_type(a.dtype, [&](auto* type) {
    return start(&hadamard<element<decltype(type)>>, dim3(unsigned(a.rows)),
                 threads_for(width >> max_radix, 512), shared, place, a);
  });
}

}  // namespace fewbit::cuda
