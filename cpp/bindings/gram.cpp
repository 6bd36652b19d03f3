#include "fewbit/gram.h"

#include "interrupt.h"
#include "op.h"

namespace fewbit::bindings {

namespace {

// Tokens per pass: G is read and written once in each, x is copied to panels in pieces of this.
constexpr int64_t pass_tokens = 1024;

template <class Real>
void add(const Tensor& x, Tensor& g) {
  const int64_t tokens = x.size(0), channels = x.size(1);
  const DType dtype = dtype_of(x, "x");
  constexpr int64_t panel = Gram<Real>::panel, block = Gram<Real>::block;
  const int64_t panels = (channels + panel - 1) / panel;
  const int64_t pass = tokens < pass_tokens ? tokens : pass_tokens;
  Tensor scratch = empty({panels, pass, panel}, ScalarType::Float);
  Interrupt interrupt;
  for (int64_t first = 0; first < tokens && !interrupt.stopped(); first += pass) {
    const int64_t n = first + pass <= tokens ? pass : tokens - first;
    const char* from = data<char>(x) + first * channels * size_of(dtype);
    run(GramPanels{from, mutable_data<float>(scratch), dtype, n, channels}, grain_for(n * panel));
    run(Gram<Real>{data<float>(scratch), mutable_data<Real>(g), n, channels},
        grain_for(n * panel * panel * block * block, 1 << 20), interrupt);
  }
  run(GramMirror<Real>{mutable_data<Real>(g), channels},
      grain_for(channels * GramMirror<Real>::block));
}

}  // namespace

void gram(const Tensor& x, Tensor g) {
  check_matrix(x, "x", "[tokens, channels]");
  const bool wide = is_double(g, "g");
  check_shape(g, {x.size(1), x.size(1)}, "g");
  check(g.is_contiguous(), "g must be contiguous: it is updated in place");
  dtype_of(x, "x");
  end_of_checks();
  const auto add_as = wide ? add<double> : add<float>;
  add_as(dense(x), g);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) { m.def("gram(Tensor x, Tensor(a!) g) -> ()"); }
FEWBIT_CPU_OP(gram)

}  // namespace fewbit::bindings
