// The packed products: which kernel, how many blocks, and the sum of what blocks share.
#include "choice.h"

namespace fewbit::cuda {

constexpr int parts_threads = 256;

struct Parts {
  PackedProduct product;
  Work work;
};

// Of tiles that blocks share: their parts in the order of k, scaled, with what is to be added. A
// thread has four neighbours of a row.
__global__ void __launch_bounds__(parts_threads, 1) sum_parts(Parts p) {
  const PackedProduct& a = p.product;
  const Work& w = p.work;
  __shared__ int64_t of_tile[4];  // its first and last block, its first row and column
  if (threadIdx.x == 0) {         // long divisions, once
    const int64_t tile = blockIdx.x;
    of_tile[0] = w.block_of(tile * w.depth);
    of_tile[1] = w.block_of((tile + 1) * w.depth - 1);
    of_tile[2] = tile % w.m_tiles * w.rows;
    of_tile[3] = tile / w.m_tiles * w.columns;
  }
  __syncthreads();
  const int64_t begin = of_tile[0], end = of_tile[1];
  const unsigned in_tile = (blockIdx.y * parts_threads + threadIdx.x) * 4;
  const unsigned in_row = in_tile / unsigned(w.columns);
  const int64_t row = of_tile[2] + in_row, n = of_tile[3] + (in_tile - in_row * w.columns);
  if (begin == end || in_row >= unsigned(w.rows) || row >= a.m || n >= a.layout.rows) return;
  const bool exact = exact_parts(a);
  uint32_t codes[4] = {};  // which may be bits of floats
  float sum[4] = {};
  for (int64_t b = begin; b <= end; ++b) {
    const int64_t at = w.slot(b, b == begin) * w.rows * w.columns + in_tile;
    const Words part = load<4>(static_cast<const uint32_t*>(a.partial) + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      codes[i] += part.v[i];
      sum[i] += float_of(part.v[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (n + i >= a.layout.rows) return;
    if (exact)  // one group: row n
      sum[i] = float(int32_t(codes[i])) * load_scale(a.scale, a.scale_dtype, n + i);
    put(a, finish(a, sum[i], row, n + i), row * a.layout.rows + n + i);
  }
}

namespace {

// Float x that tensor cores take: half, and bfloat16 from sm_80 on. For one row they are idle but
// for a sixteenth, and still take fewer instructions a weight than multiply-adds do.
bool on_tensor_cores(const PackedProduct& a, int architecture) {
  return a.dtype == DType::f16 || (a.dtype == DType::bf16 && architecture >= 80);
}

Choice choose(const PackedProduct& a, int architecture) {
  if (a.codes != 0) return choose_codes(a, architecture);
  if (!on_tensor_cores(a, architecture)) return choose_gemv(a);
  return a.dtype == DType::f16 ? choose_half(a, architecture) : choose_bfloat(a);
}

int64_t step_of(const PackedProduct& a) {
  return a.codes == 4 ? 64 : a.layout.bits == 8 ? 32 : 4 * unit_columns(a.layout.bits);
}

}  // namespace

bool multiplies_fours(const PackedProduct& a, int architecture) {
  const PackedLayout& l = a.layout;
  return architecture < 90 && l.bits == 4 && l.columns % 64 == 0 && l.group_size % 64 == 0;
}

bool serves(const PackedProduct& a, int architecture) {
  const PackedLayout& l = a.layout;
  const int64_t step = step_of(a);
  if (l.columns == 0 || l.columns % step != 0 || l.group_size % step != 0) return false;
  for (const void* p :
       {a.x, a.scale, static_cast<const void*>(a.packed), static_cast<const void*>(a.zero_point)})
    if (!at_16(p)) return false;
  return a.codes != 0 || on_tensor_cores(a, architecture) || a.m <= few_rows;
}

int blocks_for(const PackedProduct& a, int architecture, int processors) {
  const Choice c = choose(a, architecture);
  const int64_t most = c.work.pieces() / c.least, wanted = 2 * int64_t(processors);
  // Many tiles: uneven by little when each is left whole, and then nothing is to be added.
  if (c.work.tiles >= 4 * wanted && c.work.tiles < (int64_t{1} << 31)) return int(c.work.tiles);
  return int(most < 1 ? 1 : most < wanted ? most : wanted);
}

int64_t partial_bytes(const PackedProduct& a, int architecture) {
  const Work w = choose(a, architecture).work;
  return w.shares() ? w.slots() * w.rows * w.columns * 4 : 0;
}

const char* launch(const PackedProduct& a, Place place) {
  const Choice c = choose(a, place.architecture);
  const char* error =
      start(c.kernel, dim3(unsigned(a.blocks)), unsigned(c.threads), size_t(c.shared), place, a);
  if (error != nullptr || !c.work.shares()) return error;
  const int64_t elements = ceil_div(int64_t(c.work.rows) * c.work.columns, 4 * parts_threads);
  const dim3 grid(unsigned(c.work.tiles), unsigned(elements));
  return start(&sum_parts, grid, parts_threads, 0, place, Parts{a, c.work});
}

}  // namespace fewbit::cuda
