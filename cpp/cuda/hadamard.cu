#include "hadamard_base.h"
#include "hadamard_rows.h"

namespace fewbit::cuda {

constexpr unsigned hadamard_threads = 512;

// Widths of 2^k.
template <class T, bool codes>
__global__ void __launch_bounds__(hadamard_threads, 1) hadamard(HadamardLaunch launch) {
  const BlockOfRows<T> rows(launch, int64_t(blockIdx.x) << launch.log_rows,
                            reinterpret_cast<float*>(dynamic_shared()));
  Chunks v = {};
  rows.read(v);
  rows.flip_signs(v);
  rows.butterflies(v);
  if constexpr (codes)
    rows.write_codes(v);
  else
    rows.write(v);
}

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

// A row with bases around it. A block goes on with the rows that are left, so that masks are made
// once.
template <class T, bool codes, int level>
FEWBIT_DEVICE void row_with_bases(const BlockOfRows<T>& row, uint32_t* masks) {
  const HadamardLaunch& launch = row.launch;
  const HadamardRows& a = launch.a;
  float* const z = row.z;
  T* const y = static_cast<T*>(a.y) + row.first * a.width;
  Chunks v = {};
  row.read(v);
  HalfScale halves = {1.0f, 1.0f, false};
  if (launch.masks != 0) {
    float most[1] = {0.0f};
    if (row.works) each_value(v, [&](float w) { most[0] = fmaxf(most[0], fabsf(w)); });
    // Behind the masks: where rows fill shared memory, static variables would stand in their way.
    reduce_block(most, Most(),
                 reinterpret_cast<float (*)[warp_size]>(masks + mask_words(a.bases[0].m)));
    halves = half_scale(most[0] * float(1 << a.k));
  }
  row.flip_signs(v);
  row.butterflies(v);
  if (halves.serves)
    // Chunk by chunk: more conversions under way at a time would not fit the registers.
    row.last().each_chunk(v, row.end, [&](float (&w)[chunk], int) {
#pragma unroll
      for (float& value : w) value = float_of(two_halves(value * halves.to));
    });
  if (row.works) row.last().to_shared(v, z);
  __syncthreads();

  const HadamardRows::Base& base = a.bases[0];
  if (halves.serves) {
    base_on_tensor_cores<level, codes>(
        base.m, a.k, masks, reinterpret_cast<const uint32_t*>(z),
        [&](int e, int f, const Vector<float, 2>& sum) {
          if constexpr (codes) {
            *reinterpret_cast<Vector<float, 2>*>(z + (shared_place(e) ^ shared_place(f))) = {
                sum.v[0] * halves.back, sum.v[1] * halves.back};
          } else {
            Vector<T, 2> out;
#pragma unroll
            for (int i = 0; i < 2; ++i) from_float(sum.v[i] * halves.back * a.scale, &out.v[i]);
            store(y + e + f, out);
          }
        });
    if constexpr (codes) __syncthreads();
  } else {
    int n = 1 << a.k;  // what lies inside the next base
#pragma unroll 1
    for (int i = a.count - 1; i >= (codes ? 0 : 1); --i) {
      base_in_place(a.bases[i], z, n, int(a.width));
      n *= a.bases[i].m;
    }
    if constexpr (!codes) {
      const int columns = (base.m + 3) / 4 * n;
#pragma unroll 1
      for (int at = int(threadIdx.x); at < columns; at += int(blockDim.x)) {
        float sum[4];
        const int o = at / n * 4, c = at % n;
        base_column(base, z, n, o, c, sum);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (o + j < base.m) from_float(sum[j] * a.scale, y + (o + j) * n + c);
      }
    }
  }
  if constexpr (codes) {
    Chunks values = {};
    if (row.works) row.last().from_shared(z, values);
    row.write_codes(values);
  }
}

template <class T, bool codes, int level>
__global__ void __launch_bounds__(hadamard_threads, 1) hadamard_bases(HadamardLaunch launch) {
  if constexpr (compiled<Half, level>) {
    float* z = reinterpret_cast<float*>(dynamic_shared());
    uint32_t* masks = reinterpret_cast<uint32_t*>(z) + launch.masks;
    if (launch.masks != 0) make_masks(launch.a.bases[0].signs, launch.a.bases[0].m, masks);
#pragma unroll 1
    for (int64_t row = blockIdx.x; row < launch.a.rows; row += gridDim.x) {
      row_with_bases<T, codes, level>(BlockOfRows<T>(launch, row, z), masks);
      __syncthreads();
    }
  }
}

const char* launch(const HadamardRows& a, Place place) {
  HadamardLaunch all{a, 0, 0, {}, 0};
  plan_passes(all);
  int64_t team = ceil_div(a.width, thread_values);  // threads
  // Rows that a warp holds or less share a block of 128 threads, while there are enough of them for
  // every multiprocessor.
  const int64_t card = processors(place.device);
  for (; a.count == 0 && a.k >= 2 * log_chunk && a.k <= 11 && team < 128; team *= 2) {
    if (a.rows >> all.log_rows <= card) break;
    ++all.log_rows;
  }
  // One pass exchanges nothing.
  const bool exchanges = a.count > 0 || all.passes > 1;
  int64_t shared = exchanges ? hadamard_bytes(a.width << all.log_rows, false) : 0;
  int64_t in_place = 1, blocks = ceil_div(a.rows, int64_t(1) << all.log_rows);
  for (int i = a.code_scale ? 0 : 1; i < a.count; ++i)
    in_place = a.bases[i].m > in_place ? a.bases[i].m : in_place;
  if (a.count == 1 && a.bases[0].signs && a.k >= 5) {
    const int64_t with_masks =
        shared + (mask_words(a.bases[0].m) + warp_size) * int64_t(sizeof(uint32_t));
    const int64_t in_all = with_masks + (a.code_scale ? 512 : 0);  // and what reductions take
    if (in_all <= shared_memory(place.device)) {
      all.masks = int(shared / 4);
      shared = with_masks;
      team *= 4;  // the base has work for more warps than the rest
    }
  }
  // A base in place needs a thread for each four of its rows.
  const int64_t quads = ceil_div(in_place, 4);
  const unsigned block = threads_for(team < quads ? quads : team, hadamard_threads);
  if (all.masks != 0) {  // made once a block: as many blocks as registers are for
    const int64_t fill = card * (hadamard_threads / block);
    blocks = blocks < fill ? blocks : fill;
  }
  return with_type(a.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    const auto run = [&](void (*kernel)(HadamardLaunch)) {
      return start(kernel, dim3(unsigned(blocks)), block, size_t(shared), place, all);
    };
    const bool codes = a.code_scale != nullptr;
    if (a.count == 0) return codes ? run(&hadamard<T, true>) : run(&hadamard<T, false>);
    if (place.architecture >= 80)
      return codes ? run(&hadamard_bases<T, true, 80>) : run(&hadamard_bases<T, false, 80>);
    return codes ? run(&hadamard_bases<T, true, 75>) : run(&hadamard_bases<T, false, 75>);
  });
}

}  // namespace fewbit::cuda
