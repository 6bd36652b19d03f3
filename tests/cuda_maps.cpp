// Prints the index maps of the CUDA kernels for tests/test_cuda_build.py: "name key.. = value..".
#include <stdio.h>

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

int main() {
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 8; ++e)
      printf("a16 %d %d = %d %d\n", lane, e, a16(lane, e).row, a16(lane, e).column);
    for (int e = 0; e < 4; ++e)
      printf("b16 %d %d = %d %d\n", lane, e, b16(lane, e).row, b16(lane, e).column);
    for (int e = 0; e < 16; ++e)
      printf("a8 %d %d = %d %d\n", lane, e, a8(lane, e).row, a8(lane, e).column);
    for (int e = 0; e < 8; ++e)
      printf("b8 %d %d = %d %d\n", lane, e, b8(lane, e).row, b8(lane, e).column);
    for (int e = 0; e < 4; ++e)
      printf("c32 %d %d = %d %d\n", lane, e, c32(lane, e).row, c32(lane, e).column);
  }
  for (int column = 0; column < 8; ++column)
    for (int i = 0; i < 4; ++i) printf("packed_row %d %d = %d\n", column, i, packed_row(column, i));
  for (int e = 0; e < 4096; ++e) printf("shared_place %d = %d\n", e, shared_place(e));
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
}
