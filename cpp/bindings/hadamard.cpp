#include "fewbit/hadamard.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_product.h"
#include "per_token_args.h"

namespace fewbit::bindings {

namespace {

using Bases = std::vector<Tensor>;

// Raises unless v [n] holds +1 and -1 alone.
void check_signs(const int8_t* v, int64_t n, const char* name) {
  bool others = false;
  for (int64_t i = 0; i < n; ++i) others |= (v[i] != 1) & (v[i] != -1);
  if (!others) return;
  for (int64_t i = 0; i < n; ++i)
    check(v[i] == 1 || v[i] == -1, name, " must hold +1 and -1, got ", int(v[i]));
}

// Whether b [m, m] is C (x) [1 1; 1 -1] - 2 I (x) [0 1; 1 0] (hadamard.h). Below 20 two tables of
// half the rows cost more than they save.
bool is_paired(const int8_t* b, int64_t m) {
  if (m < 20 || m % 2 != 0) return false;
  for (int64_t i = 0; i < m; i += 2)
    for (int64_t o = 0; o < m; o += 2) {
      const int8_t *first = b + i * m + o, *second = first + m;
      const int c = first[0], rest = i == o ? -1 : c;
      if (first[1] != rest || second[0] != rest || second[1] != -c || (i == o && c != 1))
        return false;
    }
  return true;
}

// Whether reversing rows and columns 1 .. m - 1 of b [m, m], m odd, leaves it as it is.
bool is_mirrored(const float* b, int64_t m) {
  if (m < 3 || m % 2 == 0) return false;
  for (int64_t i = 0; i <= m / 2; ++i)
    for (int64_t o = 0; o < m; ++o)
      if (b[i * m + o] != b[(m - i) % m * m + (m - o) % m]) return false;
  return true;
}

// A factor of the transform, with the memory that it reads.
struct Factor {
  HadamardBase base;
  ScalarType type;
  Tensor matrix;  // none where the factor is kept
  std::vector<uint8_t> terms, added;
  std::vector<uint16_t> places;
  std::vector<float> products, halves;
  std::vector<char> copy;  // of the matrix, where it is

  Factor(const Factor&) = delete;  // base points into the others
  Factor& operator=(const Factor&) = delete;
  explicit Factor(const Tensor& dense_matrix)
      : type(dense_matrix.scalar_type()), matrix(dense_matrix) {
    const int64_t m = matrix.size(0);
    base = {m, false, nullptr, nullptr, nullptr, nullptr, nullptr};
    if (type == ScalarType::Float) {
      const float* b = data<float>(matrix);
      base.products = b;
      if (!is_mirrored(b, m)) return;
      const int64_t half = base.half();
      halves.assign(2 * half * half, 0.0f);  // no difference is left of row and column 0
      for (int64_t i = 0; i < half; ++i)
        for (int64_t o = 0; o < half; ++o) {
          const float here = b[i * m + o], there = b[(m - i) % m * m + o];
          halves[i * half + o] = i == 0 ? here : 0.5f * (here + there);
          if (i > 0) halves[(half + i) * half + o] = 0.5f * (here - there);
        }
      base.halves = halves.data();
      return;
    }
    const int8_t* b = data<int8_t>(matrix);
    check_signs(b, m * m, "base");
    if (m > HadamardBase::max_tables) {
      products.assign(b, b + m * m);
      base.products = products.data();
      return;
    }
    base.paired = is_paired(b, m);
    sort_outputs(b);
  }

  // Whether it took more than a look at the matrix to make this.
  bool is_derived() const { return base.terms || base.halves; }

  bool is_of(const Tensor& other) const {
    return base.m == other.size(0) && type == other.scalar_type() &&
           std::memcmp(copy.data(), other.const_data_ptr(), copy.size()) == 0;
  }

  // Copies what the caller may change. Not by torch, whose threads a forked child lacks.
  void keep() {
    const char* from = static_cast<const char*>(matrix.const_data_ptr());
    copy.assign(from, from + matrix.numel() * int64_t(matrix.element_size()));
    if (base.products) base.products = reinterpret_cast<const float*>(copy.data());
    matrix = Tensor();
  }

  // The terms of every output, and the outputs of every step by how many they add. b [m, m].
  void sort_outputs(const int8_t* b) {
    const int64_t m = base.m, order = base.order(), skip = m / order, bundles = base.bundles();
    const int64_t step = base.step_bundles();
    constexpr int all = 2 * HadamardBase::table - 1;
    std::vector<uint8_t> signs(bundles * order);  // bit i: input i of the bundle is subtracted
    for (int64_t i = 0; i < order; ++i) {
      uint8_t* to = signs.data() + i / HadamardBase::bundle * order;
      const int8_t* row = b + i * skip * m;
      const int shift = int(i % HadamardBase::bundle);
      for (int64_t o = 0; o < order; ++o) to[o] |= uint8_t((row[o * skip] < 0) << shift);
    }
    terms.resize(bundles * order);
    for (int64_t g0 = 0; g0 < bundles; g0 += step) {
      const int64_t count = std::min(step, bundles - g0);
      const uint8_t* here = signs.data() + g0 * order;
      std::vector<std::vector<uint16_t>> adding(count + 1);  // outputs, by how many terms they add
      for (int64_t o = 0; o < order; ++o) {
        int64_t plus = 0;
        for (int64_t g = 0; g < count; ++g) plus += !(here[g * order + o] & 1);
        adding[plus].push_back(uint16_t(o));
      }
      for (int64_t plus = 0; plus <= count; ++plus)
        for (const uint16_t o : adding[plus]) {
          uint8_t* to = terms.data() + g0 * order + int64_t(places.size()) % order;
          int64_t term = 0;
          places.push_back(o);
          added.push_back(uint8_t(plus));
          for (const bool less : {false, true})
            for (int64_t g = 0; g < count; ++g) {
              const int bits = here[g * order + o];
              if ((bits & 1) != less) continue;
              const int sum = (less ? all - bits : bits) >> 1;
              to[term++ * order] = uint8_t(g * HadamardBase::table + sum);
            }
        }
    }
    base.terms = terms.data();
    base.places = places.data();
    base.added = added.data();
  }
};

// The factor of `given`. The last ones are kept, by what their matrices hold: to make one of order
// 172 takes as long as three rows of 11008 numbers through it.
std::shared_ptr<const Factor> factor_of(const Tensor& given) {
  constexpr int64_t most_elements = HadamardBase::max_tables * HadamardBase::max_tables;
  constexpr size_t most = 16;
  static std::mutex guard;
  static auto& kept =
      *new std::array<std::shared_ptr<const Factor>, most>;  // never freed: threads may be in it
  static size_t next = 0;
  const Tensor matrix = dense(given);
  // A forked child may find the lock taken, for ever: it does without.
  const std::unique_lock<std::mutex> lock(guard, std::try_to_lock);
  if (lock)
    for (const auto& factor : kept)
      if (factor && factor->is_of(matrix)) return factor;
  const auto made = std::make_shared<Factor>(matrix);
  if (lock && made->is_derived() && matrix.numel() <= most_elements) {
    made->keep();
    kept[next++ % most] = made;
  }
  return made;
}

// The codes of a result that is quantised at once: q int8, or words of eight 4-bit codes.
struct Codes {
  TokenGrid grid;
  Tensor q, scale;

  Codes(const Tensor& x, TokenGrid grid)
      : grid(grid),
        q(grid.bits == 8 ? empty_on(x, {x.size(0), x.size(1)}, ScalarType::Char)
                         : empty_on(x, {x.size(0), x.size(1) / 8}, ScalarType::Int)),
        scale(empty_on(x, {x.size(0)}, ScalarType::Float)) {}
  int8_t* bytes() const { return grid.bits == 8 ? mutable_data<int8_t>(q) : nullptr; }
  uint32_t* words() const { return grid.bits == 8 ? nullptr : mutable_data<uint32_t>(q); }
};

struct Width {
  int k;
  double scale;  // 1 / sqrt(2^k), over sqrt(m) of each base of +1 and -1
};

Width width_of(const Tensor& x, const Bases& bases, const std::optional<Tensor>& signs) {
  check_matrix(x, "x", "[rows, width]");
  dtype_of(x, "x");
  const int64_t width = x.size(1);
  check(width >= 1 && width <= Hadamard::max_width, "x must be 1..", Hadamard::max_width,
        " wide, got ", width);
  int64_t n = width;  // what the bases leave
  double scale = 1.0;
  for (const Tensor& base : bases) {
    check_matrix(base, "base", "[m, m]");
    const int64_t m = base.size(0);
    check_shape(base, {m, m}, "base");
    check(m >= 1 && n % m == 0, "base must be [m, m] with m dividing the width ", n,
          ", got m = ", m);
    const bool exact = base.scalar_type() == ScalarType::Char;
    check(exact || base.scalar_type() == ScalarType::Float,
          "base must be int8 (+1, -1) or float32, got ",
          torch::headeronly::toString(base.scalar_type()));
    if (exact) scale /= std::sqrt(double(m));
    n /= m;
  }
  check((n & (n - 1)) == 0, "the width must be m 2^k, got ", width, " = ", width / n, " x ", n);
  int k = 0;
  while (int64_t(1) << k < n) ++k;
  if (signs) {
    check_shape(*signs, {width}, "signs");
    check_dtype(*signs, ScalarType::Char, "signs");
  }
  return {k, scale / std::sqrt(double(n))};
}

#if FEWBIT_WITH_CUDA
// A row that fits a block's memory, and bases that a block can do in place there; anything else
// runs in plain torch.
bool card_serves(const Tensor& x, const Bases& bases, bool codes) {
  const int64_t has = cuda::shared_memory(x.is_cuda() ? x.get_device_index() : 0);
  bool serves = cuda::hadamard_bytes(x.size(1), codes) <= has && bases.size() <= cuda::most_bases;
  for (size_t i = codes ? 0 : 1; i < bases.size(); ++i)  // the first one may go straight to y
    serves = serves && bases[i].size(0) <= cuda::most_base_in_place;
  return serves;
}

// Values of the signs are not looked at: that would wait for the card. Into y, or `codes`.
void run_on_card(const Tensor& x, const Bases& bases, const std::optional<Tensor>& signs, Width w,
                 Tensor* y, const Codes* codes) {
  const Tensor in = dense(x);
  Tensor flips;
  if (signs) flips = dense(*signs);
  cuda::HadamardRows a{};
  Bases matrices;
  for (const Tensor& base : bases) {
    const Tensor& matrix = matrices.emplace_back(dense(base));
    const bool exact = matrix.scalar_type() == ScalarType::Char;
    a.bases[a.count++] = {int(matrix.size(0)), exact ? data<int8_t>(matrix) : nullptr,
                          exact ? nullptr : data<float>(matrix)};
  }
  a.x = in.const_data_ptr();
  a.signs = signs ? data<int8_t>(flips) : nullptr;
  a.dtype = dtype_of(x, "x");
  a.rows = x.size(0);
  a.width = x.size(1);
  a.k = w.k;
  a.scale = float(w.scale);
  if (y) a.y = y->mutable_data_ptr();
  if (codes) {
    a.grid = codes->grid;
    a.code_scale = mutable_data<float>(codes->scale);
    a.q = codes->bytes();
    a.words = codes->words();
  }
  run_cuda(x, a, codes ? "hadamard_quantize" : "hadamard");
}
#endif

// x transformed, into y of its own dtype.
void run_on_cpu(const Tensor& x, const Bases& bases, const std::optional<Tensor>& signs, Width w,
                Tensor& y) {
  const int64_t width = x.size(1);
  std::vector<float> flips;
  if (signs) {
    const Tensor s = dense(*signs);
    check_signs(data<int8_t>(s), width, "signs");
    flips.assign(data<int8_t>(s), data<int8_t>(s) + width);
  }
  std::vector<std::shared_ptr<const Factor>> factors;
  std::vector<HadamardBase> given;
  for (const Tensor& base : bases) given.push_back(factors.emplace_back(factor_of(base))->base);
  const Tensor in = dense(x);
  const DType dtype = dtype_of(x, "x");
  const int64_t row_bytes = width * size_of(dtype);
  run(Hadamard{in.const_data_ptr(), signs ? flips.data() : nullptr, given.data(),
               int64_t(given.size()), y.mutable_data_ptr(), dtype, x.size(0), width, w.k,
               float(w.scale), past_caches(y, row_bytes, row_bytes)},
      grain_for(width));
}

}  // namespace

Tensor hadamard(const Tensor& x, Bases bases, std::optional<Tensor> signs) {
  const Width w = width_of(x, bases, signs);
  end_of_checks();
#if FEWBIT_WITH_CUDA
  if (architecture_of(x) != 0) {
    if (!card_serves(x, bases, false))
      return call<Tensor>("fewbit_plain::hadamard", x, bases, signs);
    Tensor y = empty_on(x, {x.size(0), x.size(1)}, x.scalar_type());
    run_on_card(x, bases, signs, w, &y, nullptr);
    return y;
  }
#endif
  Tensor y = empty({x.size(0), x.size(1)}, x.scalar_type());
  run_on_cpu(x, bases, signs, w, y);
  return y;
}

std::tuple<Tensor, Tensor> hadamard_quantize(const Tensor& x, Bases bases,
                                             std::optional<Tensor> signs, int64_t bits,
                                             std::optional<double> clip) {
  const Width w = width_of(x, bases, signs);
  check(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
  check(bits == 8 || x.size(1) % 8 == 0, "4-bit codes are stored by eights: the width must be a ",
        "multiple of 8, got ", x.size(1));
  const TokenGrid grid = token_grid(bits, clip);
  end_of_checks();
  const Codes codes(x, grid);
#if FEWBIT_WITH_CUDA
  if (architecture_of(x) != 0) {
    if (!card_serves(x, bases, true))
      return call<std::tuple<Tensor, Tensor>>("fewbit_plain::hadamard_quantize", x, bases, signs,
                                              bits, clip);
    run_on_card(x, bases, signs, w, nullptr, &codes);
    return {codes.q, codes.scale};
  }
#endif
  const Tensor in = as_float(x);
  Tensor y = empty({x.size(0), x.size(1)}, ScalarType::Float);
  run_on_cpu(in, bases, signs, w, y);
  const Scratch<int32_t> zero(x.size(0));
  quantize_tokens(y, codes.grid, std::nullopt, std::nullopt, nullptr, codes.bytes(),
                  mutable_data<float>(codes.scale), zero.get<0>(), codes.words());
  return {codes.q, codes.scale};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def("hadamard(Tensor x, Tensor[] bases, Tensor? signs) -> Tensor");
  m.def(
      "hadamard_quantize(Tensor x, Tensor[] bases, Tensor? signs, int bits, float? clip)"
      " -> (Tensor q, Tensor scale)");
}
FEWBIT_OP(hadamard)
FEWBIT_OP(hadamard_quantize)

}  // namespace fewbit::bindings
