// The CUDA kernels as bindings see them: one launch() per args struct, no torch, no CUDA headers.
//
// The same sources are compiled by nvcc, or as plain C++ over cpp/cuda/emulate.h, which runs every
// CUDA thread on the CPU: arithmetic, index maps, tails and barriers are tested without a GPU.
#pragma once
#include <array>
#include <functional>
#include <string>

#include "fewbit/act_stats.h"
#include "fewbit/dequantize.h"
#include "fewbit/gptq.h"
#include "fewbit/hadamard.h"
#include "fewbit/int8_mixed_linear.h"
#include "fewbit/norm_quantize.h"
#include "fewbit/pack.h"
#include "fewbit/pseudo_quantize.h"
#include "fewbit/quantize.h"
#include "fewbit/quantize_per_token.h"
#include "fewbit/scaled_error.h"
#include "fewbit/unpack.h"
#include "fewbit/w4a4_linear.h"

namespace fewbit::cuda {

// Where a kernel runs: compute capability (75, 80, ..), card, and a stream of it.
struct Place {
  int architecture;
  int device;
  void* stream;
};

// x times packed weights (w4a16_linear.h, w8a8_linear.h), straight from the packed layout:
//   float x:  out[m, n] = sum_g s[n, g] sum_k x[m, k] (q[n, k] - z[n, g]) + bias[n]
//   codes:    out[m, n] = sx[m] sum_g s[n, g] sum_k (x[m, k] - za[m]) (q[n, k] - z[n, g]) + ...
// q - z is exact; sums of a group are float32 (int32 for codes), groups are added in float32.
struct PackedProduct {
  const void* x;              // [m, columns] of dtype, or codes; 16-byte aligned
  const float* x_scale;       // [m]: sx, for codes
  const int32_t* x_zero;      // [m]: za; or null
  const int32_t* code_sum;    // [panels, groups, 16]: sum of q - z; null when x_zero is
  const uint32_t* packed;     // [panels, units, unit_words, 16]
  const void* scale;          // [panels, groups, 16] of scale_dtype
  const uint8_t* zero_point;  // [panels, groups, 16]
  const float* bias;          // [rows]; or null
  const float* add;           // [m, rows]: added to the product; or null
  void* partial;              // 4-byte sums of tiles that blocks share; see partial_bytes
  void* out;                  // [m, rows] of dtype
  int codes;                  // bits of the codes in x, 8 or 4 (as words); 0: x is float
  DType dtype;
  DType scale_dtype;
  int64_t m;
  int blocks;  // that share the work evenly (stream-K, product.h)
  PackedLayout layout;
};

// Whether the kernels serve it: groups in whole steps of the inner loop, aligned x, and for many
// rows a type that the card's tensor cores take.
bool serves(const PackedProduct& a, int architecture);
// Whether 4-bit codes meet 4-bit weights on tensor cores that multiply 4-bit numbers.
bool multiplies_fours(const PackedProduct& a, int architecture);
// Blocks that fill `processors` multiprocessors, and the workspace that they need.
int blocks_for(const PackedProduct& a, int architecture, int processors);
int64_t partial_bytes(const PackedProduct& a, int architecture);
// Most rows for which reading packed weights is worth it: from there on tensor cores are the limit
// and one pass that dequantises costs little (docs of Marlin and Machete; to be measured).
constexpr int64_t most_rows(int architecture) { return architecture >= 90 ? 128 : 256; }
constexpr int64_t few_rows = 4;  // most rows of x that run on CUDA cores, where tensor cores cannot

// Packed weights to a dense matrix, (q - z) s rounded to its type: what torch's own product of many
// rows takes.
struct DensePacked {
  const uint32_t* packed;
  const void* scale;
  const uint8_t* zero_point;
  void* out;  // [rows, columns] of dtype
  DType dtype;
  DType scale_dtype;
  PackedLayout layout;
};

// The float part of LLM.int8() (int8_mixed_linear.h) with the list of outliers on the card.
struct ColumnPlaces {
  const int64_t* column;  // [count]
  int32_t* place;         // [columns]: where the column is in the list, or -1; or null
  uint8_t* flag;          // [columns]: 1 where it is; or null
  int64_t count;
  int64_t columns;
};
struct OutlierProductRows {
  const void* x;             // [m, columns] of dtype
  const uint8_t* flag;       // [columns]
  int32_t* list;             // [1 + columns]: written here, the count first
  const int32_t* kept_row;   // [columns]: row of kept_weight, or -1; null: none is kept
  const float* kept_weight;  // [kept, rows]
  const uint32_t* packed;    // 8-bit codes
  const void* scale;
  const uint8_t* zero_point;
  float* add;  // [m, rows]
  DType dtype;
  DType scale_dtype;
  int64_t m;
  PackedLayout layout;
};

// GPTQ (gptq.h) with float32 sums, all rows at once, targets row by row.
constexpr int gptq_block = 128;  // columns: C of a block fits the shared memory of every card
struct GptqRows {
  const void* w;            // [rows, columns] of dtype
  const float* c;           // [columns, columns] in solving order
  const float* importance;  // [columns]; or null
  const int64_t* order;     // [columns]; or null
  float* targets;           // [rows, columns]: t, in solving order
  float* errors;            // [rows, gptq_block]: w - w' of a block
  uint8_t* q;               // [rows, columns]
  float* scale;             // [rows, groups]
  uint8_t* zero_point;      // [rows, groups]
  DType dtype;
  int64_t rows;
  int64_t columns;
  int64_t group_size;
  int64_t groups;
  int64_t points;
  GroupFit fit;
  Grid grid;
  int64_t begin, end;  // the block; launch() goes through all of them
};
bool serves(const GptqRows& a);

// Hadamard (hadamard.h) with what the card can read: matrices of signs instead of tables.
constexpr int most_bases = 4;
struct HadamardRows {
  struct Base {
    int m;
    const int8_t* signs;    // [m, m] of +1 and -1; or null
    const float* products;  // [m, m] where signs is null
  };
  const void* x;           // [rows, width] of dtype
  const int8_t* signs;     // [width] of +1 and -1; or null
  Base bases[most_bases];  // B_1 first
  int count;
  void* y;  // [rows, width] of dtype; not x
  DType dtype;
  int64_t rows;
  int64_t width;
  int k;
  float scale;  // of the result
  // Instead of y, the row's codes (quantize_per_token.h) of the float32 result:
  TokenGrid grid;
  float* code_scale;  // [rows]; or null
  int8_t* q;          // [rows, width], 8 bits
  uint32_t* words;    // [rows, width / 8], 4 bits
};
// Bytes of shared memory that a row takes: more than a card has is not served.
constexpr int64_t hadamard_bytes(int64_t width, bool codes) {
  return ceil_div(width, 128) * 512 + (codes ? 512 : 0);  // codes: what reductions take
}
// Largest m of a base whose result stays in shared memory, before another base or as codes.
constexpr int64_t most_base_in_place = 512;

// Queues the kernel; null, or what the driver says is wrong. Pointers are of the device.
const char* launch(const ActStats& a, Place place);
const char* launch(const ColumnPlaces& a, Place place);
const char* launch(const DensePacked& a, Place place);
const char* launch(const Dequantize& a, Place place);
const char* launch(const FoursOfWords& a, Place place);
const char* launch(const GptqRows& a, Place place);
const char* launch(const HadamardRows& a, Place place);
const char* launch(const NormQuantize& a, Place place);  // y is not used
const char* launch(const OutlierColumns& a, Place place);
const char* launch(const OutlierProductRows& a, Place place);
const char* launch(const Pack& a, Place place);  // all[panel] is not 0 where codes exceed
const char* launch(const PackedProduct& a, Place place);
const char* launch(const PseudoQuantize& a, Place place);
const char* launch(const Quantize& a, Place place);
const char* launch(const QuantizePerToken& a, Place place);
const char* launch(const ScaledError& a, Place place);
const char* launch(const Unpack& a, Place place);

int architecture(int device);  // 10 major + minor; 0 where there is no such device
int processors(int device);
int64_t shared_memory(int device);  // bytes that one block may have

// The emulator runs as `architecture` (0: off), its threads in ascending or descending order: a
// result that depends on the order lacks a barrier.
void emulate(int architecture, bool descending);
int emulated();
bool emulated_descending();
int64_t emulated_launches();        // kernels that the emulator has run
void refuse_launches(bool refuse);  // the emulator's next launches fail
bool refuses_launches();

// A launch as a driver sees it, and who runs the emulator's launches in its place (none: itself).
struct Launch {
  std::string kernel;  // as the linker knows it
  std::array<unsigned, 3> grid, block;
  size_t shared;
  std::string args;  // the bytes of the kernel's one parameter
};
using Runner = std::function<void(const Launch&)>;
void run_launches_by(Runner runner);

}  // namespace fewbit::cuda
