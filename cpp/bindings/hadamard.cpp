#include "fewbit/hadamard.h"

#include <cmath>
#include <vector>

#include "cuda_product.h"

namespace fewbit::bindings {

namespace {

std::vector<float> plus_minus(const Tensor& t, const char* name) {
  check_dtype(t, ScalarType::Char, name);
  const int8_t* v = data<int8_t>(t);
  std::vector<float> out(v, v + t.numel());
  for (const float f : out) check(f == 1 || f == -1, name, " must hold +1 and -1, got ", int(f));
  return out;
}

}  // namespace

#if FEWBIT_WITH_CUDA
// Values of the signs are not looked at: that would wait for the card.
static Tensor hadamard_on_cuda(const Tensor& x, const std::optional<Tensor>& base,
                               const std::optional<Tensor>& signs, int64_t m, int k, double scale) {
  const int64_t rows = x.size(0), width = x.size(1);
  if (cuda::hadamard_bytes(width) > cuda::shared_memory(x.is_cuda() ? x.get_device_index() : 0))
    return call_plain("fewbit_plain::hadamard", x, base, signs);
  const Tensor in = dense(x);
  Tensor y = empty_on(x, {rows, width}, x.scalar_type()), flips, matrix;
  if (signs) {
    check_shape(*signs, {width}, "signs");
    check_dtype(*signs, ScalarType::Char, "signs");
    check_beside(x, *signs, "signs");
    flips = dense(*signs);
  }
  bool exact = false;
  if (base) {
    check_beside(x, *base, "base");
    matrix = dense(*base);
    exact = matrix.scalar_type() == ScalarType::Char;
    check(exact || matrix.scalar_type() == ScalarType::Float,
          "base must be int8 (+1, -1) or float32, got ",
          torch::headeronly::toString(matrix.scalar_type()));
    if (exact) scale /= std::sqrt(double(m));
  }
  run_cuda(x,
           cuda::HadamardRows{in.const_data_ptr(), signs ? data<int8_t>(flips) : nullptr,
                              exact ? data<int8_t>(matrix) : nullptr,
                              base && !exact ? data<float>(matrix) : nullptr, y.mutable_data_ptr(),
                              dtype_of(x, "x"), rows, m, k, float(scale)},
           "hadamard");
  return y;
}
#endif

Tensor hadamard(const Tensor& x, std::optional<Tensor> base, std::optional<Tensor> signs) {
  check_matrix(x, "x", "[rows, width]");
  const DType dtype = dtype_of(x, "x");
  const int64_t rows = x.size(0), width = x.size(1);
  check(width >= 1 && width <= Hadamard::max_width, "x must be 1..", Hadamard::max_width,
        " wide, got ", width);
  int64_t m = 1;
  if (base) {
    check_matrix(*base, "base", "[m, m]");
    m = base->size(0);
    check_shape(*base, {m, m}, "base");
    check(m >= 1 && width % m == 0, "base must be [m, m] with m dividing the width ", width,
          ", got m = ", m);
  }
  const int64_t n = width / m;
  check((n & (n - 1)) == 0, "the width must be m 2^k, got ", width, " = ", m, " x ", n);
  int k = 0;
  while (int64_t(1) << k < n) ++k;
  double scale = 1.0 / std::sqrt(double(n));
#if FEWBIT_WITH_CUDA
  if (const int card = architecture_of(x); card != 0)
    return hadamard_on_cuda(x, base, signs, m, k, scale);
#endif
  std::vector<float> flips;
  if (signs) {
    check_shape(*signs, {width}, "signs");
    const Tensor s = dense(*signs);
    flips = plus_minus(s, "signs");
  }

  std::vector<uint8_t> patterns;
  std::vector<float> ones;
  Tensor b;
  const float* products = nullptr;
  if (base) {
    b = dense(*base);
    if (b.scalar_type() == ScalarType::Char) {
      scale /= std::sqrt(double(m));
      ones = plus_minus(b, "base");
      if (n >= Hadamard::lanes && m <= 1024) {
        const int64_t bundles = (m + Hadamard::bundle - 1) / Hadamard::bundle;
        patterns.assign(m * bundles, 0);
        for (int64_t i = 0; i < m; ++i)
          for (int64_t o = 0; o < m; ++o)
            patterns[o * bundles + i / 4] |= uint8_t((ones[i * m + o] < 0) << (i % 4));
      } else {
        products = ones.data();
      }
    } else {
      check(b.scalar_type() == ScalarType::Float, "base must be int8 (+1, -1) or float32, got ",
            torch::headeronly::toString(b.scalar_type()));
      products = data<float>(b);
    }
  }
  const Tensor in = dense(x);
  Tensor y = empty({rows, width}, scalar_type(dtype));
  run(Hadamard{in.const_data_ptr(), signs ? flips.data() : nullptr,
               patterns.empty() ? nullptr : patterns.data(), products, y.mutable_data_ptr(), dtype,
               rows, m, k, float(scale)},
      grain_for(width));
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def("hadamard(Tensor x, Tensor? base, Tensor? signs) -> Tensor");
}
FEWBIT_OP(hadamard)

}  // namespace fewbit::bindings
