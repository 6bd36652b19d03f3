// Element types that kernels read and write; arithmetic is float32 throughout.
#pragma once
#include <cstdint>

// For every function in a header that kernels use: kernels are compiled once per instruction set,
// and an out-of-line copy made with one set's instructions could be linked into all of them.
#if defined(__CUDACC__)
#define FEWBIT_ALWAYS_INLINE __host__ __device__ __forceinline__ constexpr
#else
#define FEWBIT_ALWAYS_INLINE [[gnu::always_inline]] constexpr
#endif

namespace fewbit {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

struct Half {
  uint16_t bits;
};  // IEEE binary16
struct BFloat16 {
  uint16_t bits;
};  // upper half of a binary32

FEWBIT_ALWAYS_INLINE int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

}  // namespace fewbit
