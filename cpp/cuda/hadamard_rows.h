// Rows through H_{2^k} (fewbit/hadamard.h) in registers, and what becomes of them there.
#pragma once
#include "fewbit/hadamard.h"
#include "tokens.h"

namespace fewbit::cuda {

constexpr int log_chunk = 3, chunk = 1 << log_chunk;

// Where value e of the row lies in shared memory: neighbours of 16 bytes stay together, and what
// lanes access at once is on different banks. Eight lanes with 16 bytes each differ in bits 3 to 5
// of e, or in those that are next where chunks lie 8, 16 or 32 apart; a fragment's lanes
// (hadamard_base.h) in the lowest three bits and in any two neighbouring ones above, which are what
// tells a base's rows apart. Bits may be looked at alone: shared_place(e ^ f) = shared_place(e) ^
// shared_place(f).
FEWBIT_ALWAYS_INLINE int shared_place(int e) {
  const int upper = e >> 5;
  const int pairs = upper ^ upper >> 2 ^ upper >> 4 ^ upper >> 6 ^ upper >> 8;
  return e ^ (pairs & 3) << 3 ^ ((upper ^ upper >> 2 ^ upper >> 3) & 1) << 2;
}

// A thread has eight chunks of eight neighbouring values, the chunks 2^lo apart: so 16-byte
// accesses fit global and shared memory alike, whichever bits of a value's number the chunks differ
// in. All are in registers.
using Chunks = float[chunk][chunk];
constexpr int thread_values = chunk * chunk;

// Butterflies over bits [from, to) of a value's number, which are among those that the chunks
// differ in; by: bytes between the places of chunks that differ in one bit, an exclusive or.
struct HadamardPass {
  int lo, from, to;
  int by[log_chunk];
};

// A block takes 2^log_rows neighbouring rows as one long row. Where that is more than one row, rows
// are 2^k wide: bits from k on of a value's number say which.
struct HadamardLaunch {
  static constexpr int most_passes = 4;  // bits 0 to 2 beside the first one's, then 3 each
  static_assert(Hadamard::max_width == 1 << (most_passes + 1) * log_chunk);

  HadamardRows a;
  int log_rows;
  int passes;
  HadamardPass pass[most_passes];
  int masks;  // words before the masks for tensor cores in shared memory; 0: none
};

// The first pass has the uppermost bits: lanes then read neighbouring chunks. Of short rows it has
// bits 3 to 5, so that at most one more is left, and that one writes well.
inline void plan_passes(HadamardLaunch& l) {
  const int k = l.a.k;
  const auto pass = [&](int lo, int from, int to) {
    HadamardPass& p = l.pass[l.passes++];
    p = {lo, from, to, {}};
    for (int i = 0; i < log_chunk; ++i) p.by[i] = int(sizeof(float)) * shared_place(1 << (lo + i));
  };
  const int first = k < 10 ? log_chunk : k - log_chunk, top = k < 10 ? k : first;
  pass(first, first, k);
  for (int from = k < 10 ? first + log_chunk : log_chunk; from < top; from += log_chunk)
    pass(from < k - log_chunk ? from : k - log_chunk, from, top);
}

// Which values a thread has in a pass: bits of its number are around those that tell its chunks.
struct Own {
  const HadamardPass& pass;
  int start;  // the first of them
  int place;  // its bytes into shared memory

  FEWBIT_DEVICE explicit Own(const HadamardPass& pass) : pass(pass) {
    const int low = int(threadIdx.x) & ((1 << (pass.lo - log_chunk)) - 1);
    start = (int(threadIdx.x) ^ low) << 2 * log_chunk | low << log_chunk;
    place = int(sizeof(float)) * shared_place(start);
  }
  // Of the 16 bytes with values r .. r + 3 of chunk c.
  FEWBIT_DEVICE int place_of(int c, int r) const {
    return place ^ (c & 1 ? pass.by[0] : 0) ^ (c & 2 ? pass.by[1] : 0) ^ (c & 4 ? pass.by[2] : 0) ^
           r * int(sizeof(float));
  }
  // f(v[c], the first value's number) for the chunks that start before `end`.
  template <class V, class F>
  FEWBIT_DEVICE void each_chunk(V& v, int end, const F& f) const {
#pragma unroll
    for (int c = 0; c < chunk; ++c)
      if (start + (c << pass.lo) < end) f(v[c], start + (c << pass.lo));
  }
  FEWBIT_DEVICE void to_shared(const Chunks& v, float* z) const {
    char* bytes = reinterpret_cast<char*>(z);
#pragma unroll
    for (int c = 0; c < chunk; ++c)
#pragma unroll
      for (int r = 0; r < chunk; r += 4)
        *reinterpret_cast<Vector<float, 4>*>(bytes + place_of(c, r)) = {v[c][r], v[c][r + 1],
                                                                        v[c][r + 2], v[c][r + 3]};
  }
  FEWBIT_DEVICE void from_shared(const float* z, Chunks& v) const {
    const char* bytes = reinterpret_cast<const char*>(z);
#pragma unroll
    for (int c = 0; c < chunk; ++c)
#pragma unroll
      for (int r = 0; r < chunk; r += 4) {
        const auto part = *reinterpret_cast<const Vector<float, 4>*>(bytes + place_of(c, r));
#pragma unroll
        for (int i = 0; i < 4; ++i) v[c][r + i] = part.v[i];
      }
  }
};

template <class F>
FEWBIT_DEVICE void each_value(Chunks& v, const F& f) {
#pragma unroll
  for (int c = 0; c < chunk; ++c)
#pragma unroll
    for (int r = 0; r < chunk; ++r) f(v[c][r]);
}

FEWBIT_DEVICE float flip(float v, int8_t sign) { return sign < 0 ? -v : v; }

// The rows from `first` on that a block has.
template <class T>
struct BlockOfRows {
  const HadamardLaunch& launch;
  int64_t first;
  int end;     // values
  bool works;  // whether this thread has any
  bool whole;  // whether chunks are
  int in_row;  // the bits that tell values of a row apart
  float* z;    // shared memory

  FEWBIT_DEVICE BlockOfRows(const HadamardLaunch& launch, int64_t first, float* z)
      : launch(launch), first(first), z(z) {
    const HadamardRows& a = launch.a;
    const int width = int(a.width), rows = 1 << launch.log_rows;
    end = a.rows - first < rows ? int(a.rows - first) * width : rows * width;
    works = int(threadIdx.x) * thread_values < end;
    whole = width % chunk == 0;
    in_row = launch.log_rows == 0 ? -1 : width - 1;
  }

  // The values of the first pass.
  FEWBIT_DEVICE void read(Chunks& v) const {
    const Own own(launch.pass[0]);
    const T* x = static_cast<const T*>(launch.a.x) + first * launch.a.width;
    if (whole && at_16(launch.a.x)) {
      own.each_chunk(v, end,
                     [&](float (&w)[chunk], int e) { load_floats<in_access<T>>(x + e, w); });
    } else {
      own.each_chunk(v, end, [&](float (&w)[chunk], int e) {
#pragma unroll
        for (int r = 0; r < chunk; ++r)
          if (e + r < end) w[r] = to_float(x[e + r]);
      });
    }
  }
  FEWBIT_DEVICE void flip_signs(Chunks& v) const {
    const Own own(launch.pass[0]);
    const int8_t* signs = launch.a.signs;
    if (signs && whole && at_16(signs)) {
      own.each_chunk(v, end, [&](float (&w)[chunk], int e) {
        const auto of = load<chunk>(signs + (e & in_row));
#pragma unroll
        for (int r = 0; r < chunk; ++r) w[r] = flip(w[r], of.v[r]);
      });
    } else if (signs) {
      own.each_chunk(v, end, [&](float (&w)[chunk], int e) {
#pragma unroll
        for (int r = 0; r < chunk; ++r)
          if (e + r < end) w[r] = flip(w[r], signs[(e & in_row) + r]);
      });
    }
  }

  // Sums and differences; the values are then those of the last pass.
  FEWBIT_DEVICE void butterflies(Chunks& v) const {
    if (works) inside(v);
#pragma unroll 1
    for (int p = 0;; ++p) {
      const HadamardPass& pass = launch.pass[p];
      if (works) across(v, pass);
      if (p + 1 == launch.passes) return;
      if (works) Own(pass).to_shared(v, z);
      __syncthreads();
      if (works) Own(launch.pass[p + 1]).from_shared(z, v);
    }
  }
  FEWBIT_DEVICE Own last() const { return Own(launch.pass[launch.passes - 1]); }

  // To y in the order of the last pass.
  FEWBIT_DEVICE void write(Chunks& v) const {
    T* y = static_cast<T*>(launch.a.y) + first * launch.a.width;
    each_value(v, [&](float& w) { w *= launch.a.scale; });
    if (whole) {
      last().each_chunk(v, end, [&](const float (&w)[chunk], int e) {
#pragma unroll
        for (int r = 0; r < chunk; r += in_access<T>) {
          Vector<T, in_access<T>> out;
#pragma unroll
          for (int i = 0; i < in_access<T>; ++i) from_float(w[r + i], &out.v[i]);
          store(y + e + r, out);
        }
      });
    } else {
      last().each_chunk(v, end, [&](const float (&w)[chunk], int e) {
#pragma unroll
        for (int r = 0; r < chunk; ++r)
          if (e + r < end) from_float(w[r], y + e + r);
      });
    }
  }
  // As codes.
  FEWBIT_DEVICE void write_codes(Chunks& v) const {
    const HadamardRows& a = launch.a;
    const Own own = last();
    Seen seen;
    if (works) {
      each_value(v, [&](float& w) { w *= a.scale; });
#pragma unroll
      for (int c = 0; c < chunk; ++c) seen.add(v[c], a.grid.symmetric);
    }
    const TokenStep step =
        seen.step(a.grid, launch.log_rows == 0 ? 0 : int(a.width) / thread_values);
    const Coder coder(step, a.grid, true);
    const int64_t begin = first * a.width;
    if (whole) {
      own.each_chunk(v, end, [&](const float (&w)[chunk], int e) {
        put_codes(coder, w, begin + e, a.q, a.words);
      });
    } else {
      own.each_chunk(v, end, [&](const float (&w)[chunk], int e) {
        float code[chunk];
        coder.shifted_codes(w, code);
#pragma unroll
        for (int r = 0; r < chunk; ++r)
          if (e + r < end) a.q[begin + e + r] = int8_t(bits_of(code[r]));
      });
    }
    if (works && (own.start & in_row) == 0)
      a.code_scale[first + (launch.log_rows == 0 ? 0 : own.start >> a.k)] = step.s;
  }

 private:
  FEWBIT_DEVICE void inside(Chunks& v) const {
#pragma unroll
    for (int i = 0; i < log_chunk; ++i) {
      if (i >= launch.a.k) break;
#pragma unroll
      for (int c = 0; c < chunk; ++c)
#pragma unroll
        for (int r = 0; r < chunk; ++r)
          if ((r >> i & 1) == 0) butterfly(v[c][r], v[c][r | 1 << i]);
    }
  }
  static FEWBIT_DEVICE void across(Chunks& v, const HadamardPass& pass) {
#pragma unroll
    for (int i = 0; i < log_chunk; ++i) {
      if (pass.lo + i < pass.from || pass.lo + i >= pass.to) continue;
#pragma unroll
      for (int c = 0; c < chunk; ++c)
        if ((c >> i & 1) == 0)
#pragma unroll
          for (int r = 0; r < chunk; ++r) butterfly(v[c][r], v[c | 1 << i][r]);
    }
  }
  static FEWBIT_DEVICE void butterfly(float& a, float& b) {
    const float sum = a + b;
    b = a - b;
    a = sum;
  }
};

}  // namespace fewbit::cuda
