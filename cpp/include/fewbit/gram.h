// Gram matrix of activations: G += X^T X.
//
// Each entry is one chain of fused multiply-adds over tokens in order, starting from the value
// already in G, in the type of G (products of float32 are exact in double): the result does not
// depend on threads, tiles or on how tokens were batched. Only tiles on or above the diagonal are
// computed; the rest is mirrored, so G is exactly symmetric.
#pragma once
#include "fewbit/dtype.h"
#include "fewbit/kernel.h"

namespace fewbit {

struct GramPanels {
  const void* x;  // [tokens, channels] of dtype, row-major
  float* out;     // [panels, tokens, 16], padding 0
  DType dtype;
  int64_t tokens;
  int64_t channels;

  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return (channels + 15) / 16; }
};

FEWBIT_KERNEL(GramPanels)

template <class Real>
struct Gram {
  const float* x;  // [panels, tokens, 16]: channel panels, padded with 0 (see GramPanels)
  Real* g;         // [channels, channels]; entries on and above the diagonal are updated
  int64_t tokens;
  int64_t channels;

  static constexpr int64_t panel = 16;
  static constexpr int64_t block = 8;  // panels per side of a task's square of G
  FEWBIT_ALWAYS_INLINE int64_t panels() const { return (channels + panel - 1) / panel; }
  FEWBIT_ALWAYS_INLINE int64_t blocks() const { return (panels() + block - 1) / block; }
  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return blocks() * (blocks() + 1) / 2; }
};

FEWBIT_KERNEL(Gram<float>)
FEWBIT_KERNEL(Gram<double>)

template <class Real>
struct GramMirror {
  Real* g;  // [channels, channels]: entries below the diagonal are written
  int64_t channels;

  static constexpr int64_t block = 32;  // rows per task
  FEWBIT_ALWAYS_INLINE int64_t tasks() const { return (channels + block - 1) / block; }
};

FEWBIT_KERNEL(GramMirror<float>)
FEWBIT_KERNEL(GramMirror<double>)

}  // namespace fewbit
