#include "fewbit/hadamard.h"

#include <cmath>
#include <vector>

#include "cuda_product.h"
#include "per_token_args.h"

namespace fewbit::bindings {

namespace {

std::vector<float> plus_minus(const Tensor& t, const char* name) {
  check_dtype(t, ScalarType::Char, name);
  const int8_t* v = data<int8_t>(t);
  std::vector<float> out(v, v + t.numel());
  for (const float f : out) check(f == 1 || f == -1, name, " must hold +1 and -1, got ", int(f));
  return out;
}

// The codes of a result that is quantised at once: q int8, or words of eight 4-bit codes.
struct Codes {
  int bits;
  Tensor q, scale;

  Codes(const Tensor& x, int bits)
      : bits(bits),
        q(bits == 8 ? empty_on(x, {x.size(0), x.size(1)}, ScalarType::Char)
                    : empty_on(x, {x.size(0), x.size(1) / 8}, ScalarType::Int)),
        scale(empty_on(x, {x.size(0)}, ScalarType::Float)) {}
  int8_t* bytes() const { return bits == 8 ? mutable_data<int8_t>(q) : nullptr; }
  uint32_t* words() const { return bits == 8 ? nullptr : mutable_data<uint32_t>(q); }
};

struct Width {
  int64_t m;
  int k;
  double scale;  // 1 / sqrt(2^k)
};

Width width_of(const Tensor& x, const std::optional<Tensor>& base) {
  check_matrix(x, "x", "[rows, width]");
  dtype_of(x, "x");
  const int64_t width = x.size(1);
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
  return {m, k, 1.0 / std::sqrt(double(n))};
}

#if FEWBIT_WITH_CUDA
bool card_serves(const Tensor& x, const Width& w, bool codes) {
  const int64_t has = cuda::shared_memory(x.is_cuda() ? x.get_device_index() : 0);
  return cuda::hadamard_bytes(x.size(1), codes) <= has &&
         !(codes && w.m > cuda::most_quantized_base);
}

// Values of the signs are not looked at: that would wait for the card. Into y, or `codes`.
void run_on_card(const Tensor& x, const std::optional<Tensor>& base,
                 const std::optional<Tensor>& signs, Width w, Tensor* y, const Codes* codes) {
  const Tensor in = dense(x);
  Tensor flips, matrix;
  if (signs) {
    check_shape(*signs, {x.size(1)}, "signs");
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
    if (exact) w.scale /= std::sqrt(double(w.m));
  }
  run_cuda(
      x,
      cuda::HadamardRows{in.const_data_ptr(), signs ? data<int8_t>(flips) : nullptr,
                         exact ? data<int8_t>(matrix) : nullptr,
                         base && !exact ? data<float>(matrix) : nullptr,
                         y ? y->mutable_data_ptr() : nullptr, dtype_of(x, "x"), x.size(0), w.m, w.k,
                         float(w.scale), codes ? mutable_data<float>(codes->scale) : nullptr,
                         codes ? codes->bytes() : nullptr, codes ? codes->words() : nullptr},
      codes ? "hadamard_quantize" : "hadamard");
}
#endif

// x transformed, into y of its own dtype.
void run_on_cpu(const Tensor& x, const std::optional<Tensor>& base,
                const std::optional<Tensor>& signs, Width w, Tensor& y) {
  std::vector<float> flips;
  if (signs) {
    check_shape(*signs, {x.size(1)}, "signs");
    const Tensor s = dense(*signs);
    flips = plus_minus(s, "signs");
  }
  const int64_t m = w.m, n = int64_t(1) << w.k;
  std::vector<uint8_t> patterns;
  std::vector<float> ones;
  Tensor b;
  const float* products = nullptr;
  if (base) {
    b = dense(*base);
    if (b.scalar_type() == ScalarType::Char) {
      w.scale /= std::sqrt(double(m));
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
  run(Hadamard{in.const_data_ptr(), signs ? flips.data() : nullptr,
               patterns.empty() ? nullptr : patterns.data(), products, y.mutable_data_ptr(),
               dtype_of(x, "x"), x.size(0), m, w.k, float(w.scale)},
      grain_for(x.size(1)));
}

}  // namespace

Tensor hadamard(const Tensor& x, std::optional<Tensor> base, std::optional<Tensor> signs) {
  const Width w = width_of(x, base);
#if FEWBIT_WITH_CUDA
  if (architecture_of(x) != 0) {
    if (!card_serves(x, w, false)) return call_plain("fewbit_plain::hadamard", x, base, signs);
    Tensor y = empty_on(x, {x.size(0), x.size(1)}, x.scalar_type());
    run_on_card(x, base, signs, w, &y, nullptr);
    return y;
  }
#endif
  Tensor y = empty({x.size(0), x.size(1)}, x.scalar_type());
  run_on_cpu(x, base, signs, w, y);
  return y;
}

std::tuple<Tensor, Tensor> hadamard_quantize(const Tensor& x, std::optional<Tensor> base,
                                             std::optional<Tensor> signs, int64_t bits) {
  const Width w = width_of(x, base);
  check(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
  check(bits == 8 || x.size(1) % 8 == 0, "4-bit codes are stored by eights: the width must be a ",
        "multiple of 8, got ", x.size(1));
#if FEWBIT_WITH_CUDA
  if (architecture_of(x) != 0) {
    if (!card_serves(x, w, true))
      return call_plain<2>("fewbit_plain::hadamard_quantize", x, base, signs, bits);
    const Codes codes(x, int(bits));
    run_on_card(x, base, signs, w, nullptr, &codes);
    return {codes.q, codes.scale};
  }
#endif
  const Codes codes(x, int(bits));
  const Tensor in = as_float(x);
  Tensor y = empty({x.size(0), x.size(1)}, ScalarType::Float);
  run_on_cpu(in, base, signs, w, y);
  const Scratch<int32_t> zero(x.size(0));
  quantize_tokens(y, true, std::nullopt, std::nullopt, nullptr, codes.bytes(),
                  mutable_data<float>(codes.scale), zero.get<0>(), int(bits), codes.words());
  return {codes.q, codes.scale};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def("hadamard(Tensor x, Tensor? base, Tensor? signs) -> Tensor");
  m.def(
      "hadamard_quantize(Tensor x, Tensor? base, Tensor? signs, int bits)"
      " -> (Tensor q, Tensor scale)");
}
FEWBIT_OP(hadamard)
FEWBIT_OP(hadamard_quantize)

}  // namespace fewbit::bindings
