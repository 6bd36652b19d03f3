// Prints the index maps of the CUDA kernels for tests/test_cuda_build.py: "name key.. = value..".
#include <stdio.h>

#include "../cpp/cuda/hadamard_base.h"
#include "../cpp/cuda/product.h"

using namespace fewbit;
using namespace fewbit::cuda;

template <class X, int bits, int tiles, int level>
void shape(const char* x) {
  using S = Shape<X, bits, tiles, level>;
  printf("shape %s %d %d %d = %d %d %d %d %d %d %d\n", x, bits, tiles, level, S::lane_columns,
         S::lane_words, S::step, S::slab, S::pitch, S::stages, S::shared_bytes);
}

template <class X, int bits>
void shapes(const char* x) {
  shape<X, bits, 1, 75>(x);
  shape<X, bits, 2, 75>(x);
  shape<X, bits, 1, 80>(x);
  shape<X, bits, 2, 80>(x);
  if (bits >= 4) {
    shape<X, bits, 4, 75>(x);
    shape<X, bits, 4, 80>(x);
  }
}

template <int bits>
void words() {  // which code each field of a unit's words holds, by quads
  constexpr int columns = int(unit_columns(bits));
  for (int k = 0; k < columns; ++k) {
    uint32_t quad[columns / 4] = {}, unit[3 * panel_rows] = {};
    quad[k / 4] = ((1u << bits) - 1) << 8 * (k % 4);
    put_quads<bits>(quad, unit);
    const uint32_t word[3] = {unit[0], unit[panel_rows], unit[2 * panel_rows]};
    printf("unit %d %d = %u %u %u", bits, k, word[0], word[1], word[2]);
    for (int j = 0; j < columns / 4; ++j) printf(" %u", quad_of<bits>(word, j));
    printf("\n");
  }
}

// How stream-K cuts tiles: per block its runs; per tile the slots that sum_parts reads, in order.
void work(int64_t tiles, int64_t depth, int64_t blocks) {
  Work w{};
  w.tiles = tiles;
  w.depth = depth;
  w.blocks = blocks;
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx = dim3(unsigned(b));
    int i = 0;
    each_run(w, [&](const Run& r) {
      printf("run %d %d %d %d %d = %d %d %d %d %d\n", int(tiles), int(depth), int(blocks), int(b),
             i++, int(r.tile), int(r.first), int(r.last), int(r.whole),
             int(w.slot(b, r.first == 0)));
    });
  }
  for (int64_t t = 0; t < tiles; ++t)
    printf("parts %d %d %d %d = %d %d %d\n", int(tiles), int(depth), int(blocks), int(t),
           int(w.block_of(t * depth)), int(w.block_of((t + 1) * depth - 1)), int(w.shares()));
}

int main() {
  for (int tiles = 1; tiles <= 7; ++tiles)
    for (int depth = 1; depth <= 9; ++depth)
      for (int blocks = 1; blocks <= tiles * depth; ++blocks) work(tiles, depth, blocks);
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 8; ++e)
      printf("a16 %d %d = %d %d\n", lane, e, a16(lane, e).row, a16(lane, e).column);
    for (int e = 0; e < 4; ++e)
      printf("b16 %d %d = %d %d\n", lane, e, b16(lane, e).row, b16(lane, e).column);
    for (int e = 0; e < 16; ++e)
      printf("a8 %d %d = %d %d\n", lane, e, a8(lane, e).row, a8(lane, e).column);
    for (int e = 0; e < 8; ++e)
      printf("b8 %d %d = %d %d\n", lane, e, b8(lane, e).row, b8(lane, e).column);
    for (int e = 0; e < 32; ++e)
      printf("a4 %d %d = %d %d\n", lane, e, a4(lane, e).row, a4(lane, e).column);
    for (int e = 0; e < 16; ++e)
      printf("b4 %d %d = %d %d\n", lane, e, b4(lane, e).row, b4(lane, e).column);
    for (int e = 0; e < 4; ++e)
      printf("c32 %d %d = %d %d\n", lane, e, c32(lane, e).row, c32(lane, e).column);
  }
  for (int column = 0; column < 8; ++column)
    for (int i = 0; i < 4; ++i) printf("packed_row %d %d = %d\n", column, i, packed_row(column, i));
  for (int e = 0; e < 32768; ++e) printf("shared_place %d = %d\n", e, shared_place(e));
  words<2>();
  words<3>();
  words<4>();
  words<8>();
  shapes<Half, 2>("half");
  shapes<Half, 3>("half");
  shapes<Half, 4>("half");
  shapes<Half, 8>("half");
  shapes<int8_t, 2>("int8");
  shapes<int8_t, 3>("int8");
  shapes<int8_t, 4>("int8");
  shapes<int8_t, 8>("int8");
  shapes<Int4, 4>("int4");
  for (int i = 0; i < 8; ++i) {
    const uint32_t one = 1u << (8 * (i % 4) + 4 * (i / 4));
    uint32_t low = 0, high = 0;
    (i < 4 ? low : high) = 0xF1u << 8 * (i % 4);
    printf("four %d = %u %u %d\n", i, one, word_of_fours(low, high), four_of_word(15u * one, i));
  }
}
