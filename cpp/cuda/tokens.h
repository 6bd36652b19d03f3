// A block quantises one row (token).
#pragma once
#include "codes.h"

namespace fewbit::cuda {

constexpr int row_held = 4;  // accesses of a thread that stay in registers
constexpr unsigned row_threads = 512;

// What a thread has seen of its row.
struct Seen {
  static constexpr float largest = 3.4028235e38f;  // finite
  float most[2] = {0.0f, 0.0f};  // of |v|, and 0; or, where the grid is not symmetric, of -v and v
  bool finite = true;

  // From sm_80 on a NaN stays in the maximum; before, it is noted apart.
  FEWBIT_DEVICE void widen(float& top, float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(top) : "f"(v));
#else
    top = fmaxf(top, v);
    finite &= fabsf(v) <= largest;
#endif
  }
  template <int V>
  FEWBIT_DEVICE void add(const float (&v)[V], bool symmetric) {
    if (symmetric) {
#pragma unroll
      for (int j = 0; j < V; ++j) widen(most[0], fabsf(v[j]));
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        most[0] = fmaxf(most[0], -v[j]);
        widen(most[1], v[j]);
      }
    }
  }

  // Of a row that the block has, or so many lanes; they all get the same bits.
  FEWBIT_DEVICE TokenStep step(TokenGrid grid, int lanes = 0) {
    if (!(finite && most[0] <= largest && most[1] <= largest)) most[0] = __builtin_inff();
    if (lanes > 0) {
#pragma unroll
      for (float& m : most) m = reduce_lanes(m, lanes, Most());
    } else if (grid.symmetric) {
      most[0] = reduce_block(most[0], Most());
    } else {
      reduce_block(most, Most());
    }
    return token_step(-most[0], most[1], most[0] <= largest, grid);
  }
};

// Codes of elements k .. k + V - 1 to q; or, where they are given, to words of eight 4-bit codes, V
// being 8.
template <int V>
FEWBIT_DEVICE void put_codes(const Coder& coder, const float (&w)[V], int64_t k, int8_t* q,
                             uint32_t* words) {
  float code[V];
  coder.shifted_codes(w, code);
  const Vector<int8_t, V> bytes = bytes_of<int8_t>(code);
  if constexpr (V == 8) {
    if (words) {
      const auto fours = __builtin_bit_cast(uint2, bytes);
      words[k / 8] = word_of_fours(fours.x, fours.y);
      return;
    }
  }
  store(q + k, bytes);
}

// A row in accesses of V elements; load(k, v) fills v with elements k .. k + V - 1. Rows of at most
// `held` accesses a thread stay in registers; longer ones (held = 0) are loaded at each look.
template <int V, int held, class Load>
struct Row {
  int64_t columns;
  Load load;
  float v[held == 0 ? 1 : held][V];

  FEWBIT_DEVICE Row(int64_t columns, const Load& load) : columns(columns), load(load) {
    if constexpr (held > 0) each([&](int64_t k, float (&to)[V]) { load(k, to); });
  }

  // f(k, v) for this thread's accesses; what f changes is kept where the row is.
  template <class F>
  FEWBIT_DEVICE void each(const F& f) {
    if constexpr (held > 0) {
#pragma unroll
      for (int h = 0; h < held; ++h) {
        const int k = (int(threadIdx.x) + h * int(blockDim.x)) * V;
        if (k < int(columns)) f(k, v[h]);
      }
    } else {
#pragma unroll 1
      for (int64_t k = int64_t(threadIdx.x) * V; k < columns; k += int64_t(blockDim.x) * V) {
        float w[V];
        load(k, w);
        f(k, w);
      }
    }
  }

  // The row of what map(k, v) makes of each access in place.
  template <class Map>
  FEWBIT_DEVICE auto then(const Map& map) const {
    const auto both = [load = load, map](int64_t k, float (&w)[V]) {
      load(k, w);
      map(k, w);
    };
    if constexpr (held > 0) {
      Row<V, held, Load> mapped = *this;
      mapped.each(map);
      return mapped;
    } else {
      return Row<V, held, decltype(both)>(columns, both);
    }
  }

  FEWBIT_DEVICE TokenStep fit(TokenGrid grid) {
    Seen seen;
    each([&](int64_t, const float (&w)[V]) { seen.add(w, grid.symmetric); });
    return seen.step(grid);
  }

  // As put_codes does.
  FEWBIT_DEVICE void quantize(const Coder& coder, int8_t* q, uint32_t* words) {
    each([&](int64_t k, const float (&w)[V]) { put_codes(coder, w, k, q, words); });
  }
};

// f(V, access, held) with the constants for rows of type T at the `aligned` addresses or not; f
// starts a kernel with row_block(columns, V) threads.
template <class T, class F>
auto with_row(int64_t columns, bool aligned, const F& f) {
  const auto with_held = [&](auto v, auto access) {
    constexpr int V = decltype(v)::value;
    if (columns <= int64_t(row_threads) * row_held * V)
      return f(v, access, std::integral_constant<int, row_held>());
    return f(v, access, std::integral_constant<int, 0>());
  };
  constexpr std::integral_constant<int, 8> eight;
  constexpr std::integral_constant<int, 1> one;
  if (columns % 8 != 0) return with_held(one, one);
  if (!aligned) return with_held(eight, one);
  return with_held(eight, std::integral_constant<int, in_access<T>>());
}
inline unsigned row_block(int64_t columns, int v) {
  return threads_for(ceil_div(columns, row_held * v), row_threads);
}

}  // namespace fewbit::cuda
