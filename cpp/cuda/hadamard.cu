#include "fewbit/hadamard.h"
#include "mma.h"
#include "tokens.h"

namespace fewbit::cuda {

constexpr int max_radix = 4;  // butterflies of 2^4 values are done in registers

// Stages on strides first, 2 first, .. over the row, 2^radix values per thread. Sums are made in
// the order of the strides, as on the CPU up to 4096.
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
FEWBIT_DEVICE void base_column(const HadamardRows& a, const float* z, int n, int o, int c,
                               float (&sum)[4]) {
  const int m = int(a.m);
  const bool words = m % 4 == 0 && reinterpret_cast<uintptr_t>(a.signs_base) % 4 == 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) sum[j] = 0.0f;
  const auto value = [&](int i) { return i < m ? z[shared_place(i * n + c)] : 0.0f; };
  // Signs of outputs o .. o + 3 in row i of the base, one access where rows are whole words.
  const auto signs_at = [&](int i) {
    Vector<int8_t, 4> s{{1, 1, 1, 1}};
    if (i < m && words) return load<4>(a.signs_base + i * m + o);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (i < m && o + j < m) s.v[j] = a.signs_base[i * m + o + j];
    return s;
  };
  if (a.signs_base && m <= HadamardBase::max_pattern) {  // four rows at a time
    for (int i = 0; i < m; i += 4) {
      const float x[4] = {value(i), value(i + 1), value(i + 2), value(i + 3)};
      Vector<int8_t, 4> s[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) s[r] = signs_at(i + r);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        sum[j] += (flip(x[0], s[0].v[j]) + flip(x[1], s[1].v[j])) +
                  (flip(x[2], s[2].v[j]) + flip(x[3], s[3].v[j]));
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
}

// z = B^T z in place: threads take whole columns at a time, and write when all have read.
FEWBIT_DEVICE void base_in_place(const HadamardRows& a, float* z, int n) {
  const int quads = (int(a.m) + 3) / 4, columns = int(blockDim.x) / quads;
  const int mine = int(threadIdx.x) % columns, o = int(threadIdx.x) / columns * 4;
  for (int first = 0; first < n; first += columns) {
    const int c = first + mine;
    const bool works = o < int(a.m) && c < n;
    float v[4];
    if (works) base_column(a, z, n, o, c, v);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (works && o + j < int(a.m)) z[shared_place((o + j) * n + c)] = v[j];
  }
  __syncthreads();
}

template <class T, bool codes>
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
  const auto to_row = [&](int e, float v) {
    if constexpr (codes)
      put(e, v);
    else
      from_float(v * a.scale, y + e);
  };
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
  if constexpr (codes) {
    if (based) base_in_place(a, z, n);
    const auto value = [&](int64_t k, auto& v) {
      constexpr int count = int(sizeof(v) / sizeof(v[0]));
#pragma unroll
      for (int i = 0; i < count; ++i) v[i] = get(int(k) + i) * a.scale;
    };
    const int64_t row = blockIdx.x;
    const TokenStep step = fit_row<1>(width, true, value, a.words ? 4 : 8);
    if (a.words)
      quantize_row_to_words(width, step, a.words + row * (width / 8), value);
    else if (width % 4 == 0)
      quantize_row<4>(width, true, step, a.q + row * width, value);
    else
      quantize_row<1>(width, true, step, a.q + row * width, value);
    if (threadIdx.x == 0) a.code_scale[row] = step.s;
    return;
  }
  if (!based) return;
  const int columns = (int(a.m) + 3) / 4 * n;
  for (int at = int(threadIdx.x); at < columns; at += int(blockDim.x)) {
    float v[4];
    const int o = at / n * 4, c = at % n;
    base_column(a, z, n, o, c, v);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (o + j < int(a.m)) to_row((o + j) * n + c, v[j]);
  }
}

const char* launch(const HadamardRows& a, Place place) {
  const int64_t width = a.m << a.k;
  const size_t shared =
      size_t(hadamard_bytes(width, false));  // shared_place stays inside 128 values
  return with_type(a.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    if (a.code_scale) {
      const unsigned threads = threads_for(width >> max_radix, 512);
      const unsigned quads = unsigned(ceil_div(a.m, 4));
      return start(&hadamard<T, true>, dim3(unsigned(a.rows)),
                   threads < quads ? threads_for(quads, 512) : threads, shared, place, a);
    }
    return start(&hadamard<T, false>, dim3(unsigned(a.rows)), threads_for(width >> max_radix, 512),
                 shared, place, a);
  });
}

}  // namespace fewbit::cuda
