// What the bindings of the packed matrix products share.
#pragma once
#include "fewbit/w8a8_linear.h"
#include "packed_args.h"

namespace fewbit::bindings {

struct Weight {
  Tensor words, scale, zero_point;  // dense
  std::optional<Tensor> bias;       // dense, float32
  DType scale_dtype;
  PackedLayout layout;

  const float* bias_data() const { return bias ? data<float>(*bias) : nullptr; }
};

inline Weight make_weight(const Tensor& packed, const Tensor& scale, const Tensor& zero_point,
                          const std::optional<Tensor>& bias, const PackedLayout& l) {
  check_packed(packed, scale, zero_point, l);
  Weight w{
      dense(packed), dense(scale), dense(zero_point), std::nullopt, dtype_of(scale, "scale"), l};
  if (bias) {
    check_shape(*bias, {l.rows}, "bias");
    dtype_of(*bias, "bias");
    w.bias = as_float(*bias);
  }
  return w;
}

// Panels per task: `wanted`, less for narrow weights so that every thread has work.
inline int64_t strip_of(const PackedLayout& l, int64_t wanted) {
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  while (wanted > 1 && ceil_div(l.panels(), wanted) < 4 * threads) wanted /= 2;
  return wanted;
}

constexpr int64_t tile_strip = 8;  // panels per task of a product of tiles

// What differs between float activations and codes.
struct Activations {
  const void* x;  // [m, columns]
  bool codes;
  DType dtype;  // of float x
  int64_t m;
  const float* scale;       // [m] for codes
  const int32_t* zero;      // [m] or null
  const int32_t* code_sum;  // with zero
};

// Sums of products of codes must fit 31 bits; a zero point on both sides doubles their range.
inline void check_exact(const PackedLayout& l, bool symmetric) {
  const int64_t most = symmetric ? max_columns : max_columns / 2;
  check(l.group_size <= most, "groups of int8 products hold at most ", most, " columns, got ",
        l.group_size);
}

// Whether m rows are multiplied as tiles: those that would leave most of a tile empty are not, be
// it for few rows or for small groups. A few rows of float x are all the same, as three digits of
// each lie in one; without the instructions, digits cost more than they bring.
inline bool multiplies_tiles(const PackedLayout& l, int64_t m, bool codes) {
  const bool has = cpu::isa() == Isa::avx512amx || (codes && cpu::isa() == Isa::scalar);
  return has && m > (codes ? integer_block_rows : fixed_rows) && 2 * l.group_size >= tile_columns;
}

// Codes of 8 bits are read as they lie where every group is whole tiles.
inline bool decodes_tiles(const PackedLayout& l) {
  return l.bits != 8 || l.tiles() * tile_columns != l.padded_columns();
}

// The arrays of an integer product: digits, scales and sums of Digits; codes, scales and zero
// points of m tokens where `quantized` here; and what else the caller needs. One allocation serves
// a call.
template <class... More>
using IntegerScratch = Scratch<uint32_t, float, int32_t, int8_t, float, int32_t, uint8_t, More...>;
template <class... More, class... N>
IntegerScratch<More...> integer_scratch(const PackedLayout& l, int64_t m, bool codes,
                                        bool quantized, N... more) {
  const bool tiles = multiplies_tiles(l, m, codes);
  const int64_t rows = m > 0 ? integer_rows(m, tiles, codes) : 1, padded = ceil_div(m, rows) * rows;
  const int64_t tokens = quantized ? m : 0;
  const int64_t quads = tiles ? l.tiles() * (tile_columns / 4) : l.padded_columns() / 4;
  const int64_t digits = tiles ? (codes ? 1 : tile_lefts) : codes ? 2 : max_digits;
  const int64_t tasks =
      tiles && decodes_tiles(l) ? ceil_div(l.panels(), strip_of(l, tile_strip)) : 0;
  return IntegerScratch<More...>(padded * quads * digits, m * l.groups(), m * l.groups(),
                                 tokens * l.columns, tokens, tokens,
                                 tasks * 2 * l.tiles() * tile_bytes, more...);
}

// `outliers`, or null: the float part of LLM.int8().
template <class... More>
void run_integer(const Activations& x, const Weight& w, const IntegerScratch<More...>& scratch,
                 const OutlierProduct* outliers, void* out, DType dtype) {
  const PackedLayout& l = w.layout;
  const bool tiles = multiplies_tiles(l, x.m, x.codes);
  const int64_t rows = integer_rows(x.m, tiles, x.codes);
  uint32_t* words = scratch.template get<0>();
  float* scale = scratch.template get<1>();
  void* sum = scratch.template get<2>();  // int32, or float32
  run(Digits{x.x, words, scale, sum, x.codes, x.dtype, x.m, rows, l}, grain_for(l.columns));
  run(W8A8Linear{words,
                 x.codes ? x.scale : scale,
                 sum,
                 x.zero,
                 x.code_sum,
                 x.codes,
                 data<uint32_t>(w.words),
                 w.scale.const_data_ptr(),
                 data<uint8_t>(w.zero_point),
                 w.bias_data(),
                 tiles && decodes_tiles(l) ? scratch.template get<6>() : nullptr,
                 outliers,
                 cpu::kernel_for<OutlierProduct>(),
                 out,
                 dtype,
                 w.scale_dtype,
                 x.m,
                 rows,
                 strip_of(l, tiles ? tile_strip : 4),
                 l},
      grain_for(x.m * l.columns * panel_rows * 4, 1 << 17));
}

inline void run_integer(const Activations& x, const Weight& w, const OutlierProduct* outliers,
                        void* out, DType dtype) {
  run_integer(x, w, integer_scratch(w.layout, x.m, x.codes, false), outliers, out, dtype);
}

}  // namespace fewbit::bindings
