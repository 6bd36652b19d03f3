#include "fewbit/gram.h"

#include "common.h"

namespace fewbit::bindings {

namespace {

// Tokens per pass: G is read and written once in each, x is copied to panels in pieces of this.
constexpr int64_t pass_tokens = 1024;

}  // namespace

void gram(const Tensor& x, Tensor g) {
  check_matrix(x, "x", "[tokens, channels]");
  const int64_t tokens = x.size(0), channels = x.size(1);
  check_dtype(g, ScalarType::Float, "g");
  check_shape(g, {channels, channels}, "g");
  check(g.is_contiguous(), "g must be contiguous: it is updated in place");
  const DType dtype = dtype_of(x, "x");
  const Tensor in = dense(x);
  const int64_t panels = (channels + Gram::panel - 1) / Gram::panel;
  const int64_t pass = tokens < pass_tokens ? tokens : pass_tokens;
  Tensor scratch = empty({panels, pass, Gram::panel}, ScalarType::Float);
  for (int64_t first = 0; first < tokens; first += pass) {
    const int64_t n = first + pass <= tokens ? pass : tokens - first;
    const char* from = data<char>(in) + first * channels * size_of(dtype);
    run(GramPanels{from, mutable_data<float>(scratch), dtype, n, channels},
        grain_for(n * Gram::panel));
    run(Gram{data<float>(scratch), mutable_data<float>(g), n, channels},
        grain_for(n * Gram::panel * Gram::panel * Gram::block * Gram::block, 1 << 20));
  }
  run(GramMirror{mutable_data<float>(g), channels}, grain_for(channels * GramMirror::block));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) { m.def("gram(Tensor x, Tensor(a!) g) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(fewbit, CPU, m) { m.impl("gram", TORCH_BOX(&gram)); }

}  // namespace fewbit::bindings
