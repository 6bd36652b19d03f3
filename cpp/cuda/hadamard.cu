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

// Place of element (i, c) of z [blocks, m, n] seen as m rows of blocks n columns.
FEWBIT_DEVICE int base_place(int i, int c, int m, int n) { return (c / n * m + i) * n + c % n; }

// Outputs o .. o + 3 of column c of a base: y = B^T z for z [blocks, m, n] in shared memory.
FEWBIT_DEVICE void base_column(const HadamardRows::Base& b, const float* z, int n, int o, int c,
                               float (&sum)[4]) {
  const int m = b.m, first = base_place(0, c, m, n);
  const bool words = m % 4 == 0 && reinterpret_cast<uintptr_t>(b.signs) % 4 == 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) sum[j] = 0.0f;
  const auto value = [&](int i) { return i < m ? z[shared_place(first + i * n)] : 0.0f; };
  // Signs of outputs o .. o + 3 in row i of the base, one access where rows are whole words.
  const auto signs_at = [&](int i) {
    Vector<int8_t, 4> s{{1, 1, 1, 1}};
    if (i < m && words) return load<4>(b.signs + i * m + o);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (i < m && o + j < m) s.v[j] = b.signs[i * m + o + j];
    return s;
  };
  if (b.signs && m <= HadamardBase::max_tables) {  // four rows at a time
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
          sum[j] =
              fmaf(x, b.signs ? float(b.signs[i * m + o + j]) : b.products[i * m + o + j], sum[j]);
    }
  }
}

// z = B^T z in place: threads take whole columns at a time, and write when all have read.
FEWBIT_DEVICE void base_in_place(const HadamardRows::Base& b, float* z, int n, int width) {
  const int quads = (b.m + 3) / 4, columns = int(blockDim.x) / quads;
  const int mine = int(threadIdx.x) % columns, o = int(threadIdx.x) / columns * 4;
  for (int first = 0; first < width / b.m; first += columns) {
    const int c = first + mine;
    const bool works = o < b.m && c < width / b.m;
    float v[4];
    if (works) base_column(b, z, n, o, c, v);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (works && o + j < b.m) z[shared_place(base_place(o + j, c, b.m, n))] = v[j];
  }
  __syncthreads();
}

template <class T, bool codes>
__global__ void hadamard(HadamardRows a) {
  const int width = int(a.width);
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
  const bool based = a.count > 0;
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
  int n = 1 << a.k;  // what lies inside the next base
#pragma unroll 1
  for (int i = a.count - 1; i >= (codes ? 0 : 1); --i) {
    base_in_place(a.bases[i], z, n, width);
    n *= a.bases[i].m;
  }
  if constexpr (codes) {
    const auto value = [&](int64_t k, auto& v) {
      constexpr int count = int(sizeof(v) / sizeof(v[0]));
#pragma unroll
      for (int i = 0; i < count; ++i) v[i] = get(int(k) + i) * a.scale;
    };
    const int64_t row = blockIdx.x;
    const TokenStep step = fit_row<1>(width, a.grid, value);
    if (a.words)
      quantize_row_to_words(width, a.grid, step, a.words + row * (width / 8), value);
    else if (width % 4 == 0)
      quantize_row<4>(width, a.grid, step, a.q + row * width, value);
    else
      quantize_row<1>(width, a.grid, step, a.q + row * width, value);
    if (threadIdx.x == 0) a.code_scale[row] = step.s;
    return;
  }
  if (!based) return;
  const HadamardRows::Base& base = a.bases[0];
  const int columns = (base.m + 3) / 4 * n;
  for (int at = int(threadIdx.x); at < columns; at += int(blockDim.x)) {
    float v[4];
    const int o = at / n * 4, c = at % n;
    base_column(base, z, n, o, c, v);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (o + j < base.m) to_row((o + j) * n + c, v[j]);
  }
}

const char* launch(const HadamardRows& a, Place place) {
  const size_t shared =
      size_t(hadamard_bytes(a.width, false));  // shared_place stays inside 128 values
  int64_t in_place = 1;
  for (int i = a.code_scale ? 0 : 1; i < a.count; ++i)
    in_place = a.bases[i].m > in_place ? a.bases[i].m : in_place;
  // A base in place needs a thread for each four of its rows.
  const unsigned threads = threads_for(a.width >> max_radix, 512);
  const unsigned quads = unsigned(ceil_div(in_place, 4));
  const unsigned block = threads < quads ? threads_for(quads, 512) : threads;
  return with_type(a.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    return start(a.code_scale ? &hadamard<T, true> : &hadamard<T, false>, dim3(unsigned(a.rows)),
                 block, shared, place, a);
  });
}

}  // namespace fewbit::cuda
