#include "fewbit/hadamard.h"
#include "hadamard_base.h"
#include "tokens.h"

namespace fewbit::cuda {

constexpr unsigned hadamard_threads = 512;
constexpr int max_radix = 4;  // butterflies of 2^4 values are done in registers

// In place: sums and differences of neighbours, then of pairs, ..
template <int count>
FEWBIT_DEVICE void butterfly(float (&v)[count]) {
#pragma unroll
  for (int half = 1; half < count; half *= 2)
#pragma unroll
    for (int r = 0; r < count; ++r)
      if ((r & half) == 0) {
        const float a = v[r], b = v[r + half];
        v[r] = a + b;
        v[r + half] = a - b;
      }
}

// Stages of 2^radix values 2^log_first apart. Sums are made in the order of the strides, as on the
// CPU up to 4096. get and put take a value's number in the row and its place in shared memory.
template <int radix, int log_first, class Get, class Put>
FEWBIT_DEVICE void butterfly_pass(int width, const Get& get, const Put& put) {
  constexpr int count = 1 << radix, first = 1 << log_first;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < width >> radix; i += int(blockDim.x)) {
    const int base = (i >> log_first << (log_first + radix)) + (i & (first - 1));
    const int at = shared_place(base);
    float v[count];
#pragma unroll
    for (int r = 0; r < count; ++r) v[r] = get(base + r * first, at ^ shared_place(r * first));
    butterfly(v);
#pragma unroll
    for (int r = 0; r < count; ++r) put(base + r * first, at ^ shared_place(r * first), v[r]);
  }
  __syncthreads();
}

template <int log_first, class Get, class Put>
FEWBIT_DEVICE void pass_of(int radix, int width, const Get& get, const Put& put) {
  switch (radix) {
    case 0: butterfly_pass<0, log_first>(width, get, put); break;
    case 1: butterfly_pass<1, log_first>(width, get, put); break;
    case 2: butterfly_pass<2, log_first>(width, get, put); break;
    case 3: butterfly_pass<3, log_first>(width, get, put); break;
    default: butterfly_pass<4, log_first>(width, get, put); break;
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

// The row's first pass where accesses are of 16 bytes: 16 neighbours a thread. The largest that
// this thread has seen.
template <class T>
FEWBIT_DEVICE float first_pass(const HadamardRows& a, const T* x, int width, float* z) {
  constexpr int count = 1 << max_radix, in_access = 16 / int(sizeof(T));
  float most = 0.0f;
#pragma unroll 1
  for (int base = int(threadIdx.x) * count; base < width; base += int(blockDim.x) * count) {
    float v[count];
    load_floats<in_access>(x + base, v);
#pragma unroll
    for (int r = 0; r < count; ++r) most = fmaxf(most, fabsf(v[r]));
    if (a.signs) {
      const Vector<int8_t, count> sign = load<count>(a.signs + base);
#pragma unroll
      for (int r = 0; r < count; ++r) v[r] = flip(v[r], sign.v[r]);
    }
    butterfly(v);
    const int at = shared_place(base);
#pragma unroll
    for (int r = 0; r < count; r += 4)
      *reinterpret_cast<Vector<float, 4>*>(z + (at ^ shared_place(r))) = {v[r], v[r + 1], v[r + 2],
                                                                          v[r + 3]};
  }
  __syncthreads();
  return most;
}

// Stages from log_first on, the last of them to `last`.
template <int log_first, class Get, class Put, class Last>
FEWBIT_DEVICE void passes_from(int k, int width, const Get& get, const Put& put, const Last& last) {
  if constexpr (log_first < 16) {
    if (k <= log_first + max_radix) {
      pass_of<log_first>(k - log_first, width, get, last);
    } else {
      butterfly_pass<max_radix, log_first>(width, get, put);
      passes_from<log_first + max_radix>(k, width, get, put, last);
    }
  }
}

// With masks for the tensor cores that many words into shared memory, behind the row; 0: none.
struct HadamardLaunch {
  HadamardRows a;
  int masks;
};

template <class T, bool codes, int level>
FEWBIT_DEVICE void hadamard_row(const HadamardLaunch& launch, int64_t row, float* z,
                                uint32_t* masks) {
  const HadamardRows& a = launch.a;
  const int width = int(a.width);
  const T* x = static_cast<const T*>(a.x) + row * width;
  T* y = static_cast<T*>(a.y) + row * width;
  float most = 0.0f;
  const auto from_row = [&](int e, int) {
    const float v = to_float(x[e]);
    most = fmaxf(most, fabsf(v));
    return a.signs ? flip(v, a.signs[e]) : v;
  };
  const auto get = [&](int, int place) { return z[place]; };
  const auto put = [&](int, int place, float v) { z[place] = v; };
  const auto to_row = [&](int e, int, float v) { from_float(v * a.scale, y + e); };
  const bool stays = a.count > 0 || codes;  // in shared memory, for what comes next
  const bool wide = a.k > max_radix && reinterpret_cast<uintptr_t>(a.x) % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(a.signs) % 16 == 0;
  const int first = a.k < max_radix ? a.k : max_radix;  // stages of the first pass
  if (wide)
    most = first_pass(a, x, width, z);
  else if (first == a.k && !stays)
    pass_of<0>(first, width, from_row, to_row);
  else
    pass_of<0>(first, width, from_row, put);
  int bases = a.count;
  if (launch.masks != 0) {
    // Behind the masks: where rows fill shared memory, static variables would stand in their way.
    const auto of_warp = reinterpret_cast<float (*)[warp_size]>(masks + mask_words(a.bases[0].m));
    float largest[1] = {most};
    reduce_block(largest, Most(), of_warp);
    const HalfScale scale = half_scale(largest[0] * float(1 << a.k));
    if (scale.serves) {
      const HadamardRows::Base& base = a.bases[0];
      const int n = 1 << a.k;
      const uint32_t* halves = reinterpret_cast<const uint32_t*>(z);
      passes_from<max_radix>(a.k, width, get, put, [&](int, int place, float v) {
        z[place] = float_of(two_halves(v * scale.to));
      });
      bases = 0;
      if constexpr (codes) {
        base_on_tensor_cores<level, true>(
            base.m, n, masks, halves, [&](int e, const Vector<float, 2>& v) {
              *reinterpret_cast<Vector<float, 2>*>(z + shared_place(e)) = {v.v[0] * scale.back,
                                                                           v.v[1] * scale.back};
            });
        __syncthreads();
      } else {
        base_on_tensor_cores<level, false>(base.m, n, masks, halves,
                                           [&](int e, const Vector<float, 2>& v) {
                                             Vector<T, 2> out;
#pragma unroll
                                             for (int i = 0; i < 2; ++i)
                                               from_float(v.v[i] * scale.back * a.scale, &out.v[i]);
                                             store(y + e, out);
                                           });
        return;
      }
    }
  }
  if (bases == a.count && first < a.k) {
    if (stays)
      passes_from<max_radix>(a.k, width, get, put, put);
    else
      passes_from<max_radix>(a.k, width, get, put, to_row);
  }
  int n = 1 << a.k;  // what lies inside the next base
#pragma unroll 1
  for (int i = bases - 1; i >= (codes ? 0 : 1); --i) {
    base_in_place(a.bases[i], z, n, width);
    n *= a.bases[i].m;
  }
  if constexpr (codes) {
    const auto value = [=, scale = a.scale](int64_t k, auto& v) {
      constexpr int V = int(sizeof(v) / sizeof(float)), in_access = V < 4 ? V : 4;
#pragma unroll
      for (int i = 0; i < V; i += in_access) {
        const auto part =
            *reinterpret_cast<const Vector<float, in_access>*>(z + shared_place(int(k) + i));
#pragma unroll
        for (int j = 0; j < in_access; ++j) v[i + j] = part.v[j] * scale;
      }
    };
    const auto quantize = [&](auto v, auto held) {
      Row<decltype(v)::value, decltype(held)::value, decltype(value)> of_row(width, value);
      const TokenStep step = of_row.fit(a.grid);
      of_row.quantize(Coder(step, a.grid, true), a.q + row * width,
                      a.words ? a.words + row * (width / 8) : nullptr);
      if (threadIdx.x == 0) a.code_scale[row] = step.s;
    };
    constexpr std::integral_constant<int, 0> none;
    constexpr std::integral_constant<int, 8> eight;
    if (width % 8 != 0)
      quantize(std::integral_constant<int, 1>(), none);
    else if (width > int(blockDim.x) * 8 * row_held)
      quantize(eight, none);
    else
      quantize(eight, std::integral_constant<int, row_held>());
    return;
  }
  if (bases == 0) return;
  const HadamardRows::Base& base = a.bases[0];
  const int columns = (base.m + 3) / 4 * n;
#pragma unroll 1
  for (int at = int(threadIdx.x); at < columns; at += int(blockDim.x)) {
    float v[4];
    const int o = at / n * 4, c = at % n;
    base_column(base, z, n, o, c, v);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (o + j < base.m) to_row((o + j) * n + c, 0, v[j]);
  }
}

// A block does row after row, so that masks are made once.
template <class T, bool codes, int level>
__global__ void __launch_bounds__(hadamard_threads, 1) hadamard(HadamardLaunch launch) {
  if constexpr (compiled<Half, level>) {
    float* z = reinterpret_cast<float*>(dynamic_shared());
    uint32_t* masks = reinterpret_cast<uint32_t*>(z) + launch.masks;
    if (launch.masks != 0) make_masks(launch.a.bases[0].signs, launch.a.bases[0].m, masks);
#pragma unroll 1
    for (int64_t row = blockIdx.x; row < launch.a.rows; row += gridDim.x) {
      hadamard_row<T, codes, level>(launch, row, z, masks);
      __syncthreads();
    }
  }
}

const char* launch(const HadamardRows& a, Place place) {
  int64_t shared = hadamard_bytes(a.width, false);  // shared_place stays inside 128 values
  int64_t in_place = 1, blocks = a.rows;
  for (int i = a.code_scale ? 0 : 1; i < a.count; ++i)
    in_place = a.bases[i].m > in_place ? a.bases[i].m : in_place;
  HadamardLaunch all{a, 0};
  if (a.count == 1 && a.bases[0].signs && a.k >= 5) {
    const int64_t with_masks =
        shared + (mask_words(a.bases[0].m) + warp_size) * int64_t(sizeof(uint32_t));
    const int64_t in_all = with_masks + (a.code_scale ? 512 : 0);  // and what reductions take
    if (in_all <= shared_memory(place.device)) {
      all.masks = int(shared / 4);
      const int64_t fill = 4 * int64_t(processors(place.device));
      shared = with_masks;
      blocks = blocks < fill ? blocks : fill;
      in_place = 1;
    }
  }
  // A base in place needs a thread for each four of its rows.
  const unsigned threads = threads_for(a.width >> max_radix, hadamard_threads);
  const unsigned quads = unsigned(ceil_div(in_place, 4));
  const unsigned block = threads < quads ? threads_for(quads, hadamard_threads) : threads;
  return with_type(a.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    const auto run = [&](auto codes, auto level) {
      return start(&hadamard<T, decltype(codes)::value, decltype(level)::value>,
                   dim3(unsigned(blocks)), block, size_t(shared), place, all);
    };
    const auto with_codes = [&](auto level) {
      return a.code_scale ? run(std::true_type(), level) : run(std::false_type(), level);
    };
    return place.architecture >= 80 ? with_codes(std::integral_constant<int, 80>())
                                    : with_codes(std::integral_constant<int, 75>());
  });
}

}  // namespace fewbit::cuda
