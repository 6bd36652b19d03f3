// Every kernel's tasks on real threads at once, for ThreadSanitizer: scripts/sanitize.sh thread.
//
// Torch's own threads are not instrumented, so the operators are not run here but what they are
// made of: each kernel, torch-free, with its tasks dealt out to four threads that nothing orders.
// Two tasks that write one byte, or one that reads what another writes, are a race even where the
// result happens to be right; results are compared with those of one thread as well.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "fewbit/act_stats.h"
#include "fewbit/coordinate_descent.h"
#include "fewbit/dequantize.h"
#include "fewbit/gptq.h"
#include "fewbit/gram.h"
#include "fewbit/hadamard.h"
#include "fewbit/int8_mixed_linear.h"
#include "fewbit/norm_quantize.h"
#include "fewbit/pack.h"
#include "fewbit/pack_fields.h"
#include "fewbit/pseudo_quantize.h"
#include "fewbit/quantize.h"
#include "fewbit/quantize_per_token.h"
#include "fewbit/scaled_error.h"
#include "fewbit/unpack.h"
#include "fewbit/unpack_fields.h"
#include "fewbit/w4a16_linear.h"
#include "fewbit/w4a4_linear.h"
#include "fewbit/w8a8_linear.h"

using namespace fewbit;

namespace {

int threads = 1;
int failures = 0;

template <class Args>
void run(const Args& args) {
  const Kernel<Args> kernel = cpu::kernel_for<Args>();
  const int64_t tasks = args.tasks();
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      for (int64_t i = t; i < tasks; i += threads) kernel(args, i, i + 1);
    });
  for (std::thread& thread : pool) thread.join();
}

template <class T>
using Data = std::vector<T>;

Data<float> numbers(int64_t count, float size = 1.0f) {
  Data<float> out(size_t(count), 0.0f);
  uint32_t state = 12345;
  for (float& v : out) {
    state = state * 1664525u + 1013904223u;
    v = size * (float(state >> 8) / float(1 << 23) - 1.0f);
  }
  return out;
}

template <class T = uint8_t>
Data<T> codes(int64_t count, unsigned below) {
  Data<T> out(size_t(count), T(0));
  uint32_t state = 999;
  for (T& v : out) {
    state = state * 1664525u + 1013904223u;
    v = T((state >> 16) % below);
  }
  return out;
}

template <class... T>
std::string bytes(const Data<T>&... data) {
  std::string out;
  (out.append(reinterpret_cast<const char*>(data.data()), data.size() * sizeof(T)), ...);
  return out;
}

// Runs `make` on one thread and on four; it returns all bytes that its kernels have written.
template <class Make>
void check(const char* name, const Make& make) {
  threads = 1;
  const std::string want = make();
  threads = 4;
  for (int repeat = 0; repeat < 3; ++repeat)
    if (make() != want) {
      printf("%s %s: other bits on four threads\n", cpu::isa_name(cpu::isa()), name);
      ++failures;
    }
}

constexpr int64_t N = 150, K = 200, M = 37, group = 48, groups = (K + group - 1) / group;
const Grid grid{4, false, DType::f32};

// A packed weight with all that its consumers read.
struct Weight {
  PackedLayout layout;
  Data<uint32_t> packed;
  Data<float> scale;
  Data<uint8_t> zero_point, all;

  explicit Weight(int bits)
      : layout{N, K, group, bits},
        packed(size_t(layout.words())),
        scale(size_t(layout.panels() * groups * panel_rows)),
        zero_point(scale.size()),
        all(size_t(layout.panels())) {
    const Data<uint8_t> q = codes(N * K, 1u << bits), z = codes(N * groups, 1u << bits);
    const Data<float> s = numbers(N * groups);
    run(Pack{q.data(), s.data(), z.data(), packed.data(), scale.data(), zero_point.data(),
             all.data(), 4, false, layout});
  }
};

void grids() {
  const Data<float> w = numbers(N * K);
  check("quantize", [&] {
    Data<uint8_t> q(N * K), z(N * groups);
    Data<float> s(N * groups);
    run(Quantize{w.data(), q.data(), s.data(), z.data(), DType::f32, N, K, group, groups, grid,
                 false});
    Data<float> back(N * K);
    run(Dequantize{q.data(), s.data(), z.data(), back.data(), DType::f32, N, K, group, groups,
                   false});
    return bytes(q, s, z, back);
  });
  check("pseudo_quantize", [&] {
    Data<float> out = w;  // in place
    run(PseudoQuantize{out.data(), out.data(), DType::f32, N, K, group, grid, false});
    return bytes(out);
  });
}

void candidates() {
  const Data<float> w = numbers(N * K), scale(3 * K, 1.25f);
  check("scaled_error", [&] {
    Data<float> error(3 * N * K);
    run(ScaledError{w.data(), scale.data(), error.data(), DType::f32, 3, N, K, group, grid});
    return bytes(error);
  });
  const Data<uint32_t> words = codes<uint32_t>(M * K / 8, 65521);
  check("w4a4_linear", [&] {
    Data<int8_t> q(M * K);
    run(FoursOfWords{words.data(), q.data(), M, K});
    return bytes(q);
  });
}

void statistics() {
  const int64_t channels = 2100;  // several tasks of each kind
  const Data<float> x = numbers(M * channels);
  check("act_stats", [&] {
    Data<double> sum(channels);
    Data<float> most(channels);
    run(ActStats{x.data(), sum.data(), most.data(), DType::f32, M, channels});
    return bytes(sum, most);
  });
  const int64_t panels = (channels + 15) / 16;
  const auto gram = [&](auto zero) {
    using Real = decltype(zero);
    Data<float> in(panels * M * 16);
    run(GramPanels{x.data(), in.data(), DType::f32, M, channels});
    Data<Real> g(channels * channels);
    run(Gram<Real>{in.data(), g.data(), M, channels});
    run(GramMirror<Real>{g.data(), channels});
    return bytes(in, g);
  };
  check("gram", [&] { return gram(0.0f); });
  check("gram, double", [&] { return gram(0.0); });
}

void rotations() {
  const int64_t m = 12, width = m * 32;
  const Data<float> x = numbers(M * width), signs(width, -1.0f), base = numbers(m * m);
  const Data<uint8_t> terms = codes(m * 3, 8), added(m, 2);
  Data<uint16_t> places(m);
  for (int64_t o = 0; o < m; ++o) places[o] = uint16_t(m - 1 - o);
  for (const bool tabulated : {false, true})
    check("hadamard", [&] {
      const HadamardBase factor{m,
                                false,
                                tabulated ? terms.data() : nullptr,
                                places.data(),
                                added.data(),
                                tabulated ? nullptr : base.data(),
                                nullptr};
      Data<float> y(M * width);
      run(Hadamard{x.data(), signs.data(), &factor, 1, y.data(), DType::f32, M, width, 5, 0.125f,
                   false});
      return bytes(y);
    });
}

void layouts() {
  for (const int bits : {2, 3, 4, 8})
    check("pack, unpack", [&] {
      const Weight w(bits);
      Data<uint8_t> q(N * K), z(N * groups);
      Data<float> s(N * groups);
      run(Unpack{w.packed.data(), w.scale.data(), w.zero_point.data(), q.data(), s.data(), z.data(),
                 4, false, w.layout});
      return bytes(w.packed, w.scale, w.zero_point, w.all, q, s, z);
    });
  for (int bits = 2; bits <= 8; ++bits)
    for (const bool interleave : {false, true}) {
      if (interleave && bits != 4) continue;
      check("pack_fields, unpack_fields", [&] {
        const int64_t rows = 152, row_words = interleave ? K : (K * bits + 31) / 32;
        const Data<uint8_t> q = codes(rows * K, 1u << bits);
        Data<uint32_t> words(interleave ? rows / 8 * K : rows * row_words);
        Data<uint8_t> back(rows * K);
        run(PackFields{q.data(), words.data(), rows, K, bits, interleave});
        run(UnpackFields{words.data(), back.data(), rows, K, row_words, bits, interleave});
        return bytes(words, back);
      });
    }
}

void tokens() {
  const Data<float> x = numbers(M * K), weight = numbers(K);
  for (const bool symmetric : {true, false}) {
    check("quantize_per_token", [&] {
      Data<int8_t> q(M * K);
      Data<float> s(M);
      Data<int32_t> z(M);
      run(QuantizePerToken{x.data(),
                           nullptr,
                           nullptr,
                           nullptr,
                           q.data(),
                           s.data(),
                           z.data(),
                           DType::f32,
                           {symmetric},
                           M,
                           K});
      return bytes(q, s, z);
    });
    check("norm_quantize", [&] {
      Data<int8_t> q(M * K);
      Data<float> y(M * K), s(M);
      Data<int32_t> z(M);
      run(NormQuantize{x.data(), weight.data(), nullptr, y.data(), q.data(), s.data(), z.data(),
                       1e-5f, DType::f32, symmetric, symmetric, M, K});
      return bytes(q, y, s, z);
    });
  }
}

std::string float_product(const Weight& w, const Data<float>& x, int64_t m) {
  const PackedLayout& l = w.layout;
  const bool direct = m <= direct_rows;
  const int64_t rows = float_block_rows(m), blocks = ceil_div(m, rows);
  Data<float> prepared(blocks * l.padded_columns() * rows), out(m * N);
  Data<float> sums(direct ? m * groups : l.panels() * blocks * rows * panel_rows);
  run(W4A16Prepare{x.data(), prepared.data(), direct ? sums.data() : nullptr, DType::f32, m, rows,
                   l});
  run(W4A16Linear{prepared.data(), direct ? sums.data() : nullptr, w.packed.data(), w.scale.data(),
                  w.zero_point.data(), nullptr, direct ? nullptr : sums.data(), out.data(),
                  DType::f32, DType::f32, m, rows, 2, l});
  return bytes(prepared, out);
}

// With int8 codes of x, or its digits; with the float product of LLM.int8() beside it, or alone.
std::string integer_product(const Weight& w, const Data<float>& x, int64_t m, bool coded,
                            const OutlierProduct* outliers) {
  const PackedLayout& l = w.layout;
  const bool tiles =
      m > integer_block_rows && (cpu::isa() == Isa::scalar || cpu::isa() == Isa::avx512amx);
  const int64_t rows = integer_rows(m, tiles, coded), blocks = ceil_div(m, rows);
  const int64_t digits = coded ? 2 : max_digits;
  const int64_t columns = tiles ? l.tiles() * tile_columns : l.padded_columns();
  const Data<int8_t> a = codes<int8_t>(m * K, 127);
  const Data<float> token_scale(m, 0.5f);
  Data<uint32_t> in(blocks * rows * (columns / 4) * digits);
  Data<float> scale(m * groups), out(m * N);
  Data<int32_t> sum(m * groups);
  Data<uint8_t> decoded(ceil_div(l.panels(), 2) * 2 * l.tiles() * tile_bytes);
  run(Digits{coded ? static_cast<const void*>(a.data()) : x.data(), in.data(), scale.data(),
             sum.data(), coded, DType::f32, m, rows, l});
  run(W8A8Linear{in.data(),
                 coded ? token_scale.data() : scale.data(),
                 sum.data(),
                 nullptr,
                 nullptr,
                 coded,
                 w.packed.data(),
                 w.scale.data(),
                 w.zero_point.data(),
                 nullptr,
                 decoded.data(),
                 outliers,
                 cpu::kernel_for<OutlierProduct>(),
                 out.data(),
                 DType::f32,
                 DType::f32,
                 m,
                 rows,
                 2,
                 l});
  return bytes(in, out);
}

void products() {
  const Data<float> x = numbers(M * K);
  for (const int bits : {2, 3, 4, 8}) {
    const Weight w(bits);
    for (const int64_t m : {int64_t(1), int64_t(5), M})
      check("w4a16_linear", [&] { return float_product(w, x, m); });
    for (const int64_t m : {int64_t(2), M})
      check("w4a16_linear, digits", [&] { return integer_product(w, x, m, false, nullptr); });
    check("w8a8_linear", [&] { return integer_product(w, x, M, true, nullptr); });
  }
  const Weight w(8);
  check("int8_mixed_linear", [&] {
    Data<uint8_t> flag(K);
    run(OutlierColumns{x.data(), flag.data(), 0.99f, DType::f32, M, K});
    std::vector<Outlier> outlier;
    for (int64_t k = 0; k < K; ++k)
      if (flag[size_t(k)]) {
        const int64_t g = k / group, unit = g * w.layout.group_units() + k % group / 4;
        outlier.push_back({k, g, unit * panel_rows, int(8 * (k % group % 4)), nullptr});
      }
    const int64_t count = int64_t(outlier.size());
    Data<float> columns(M * count), part(M * w.layout.panels() * panel_rows);
    run(OutlierGather{x.data(), outlier.data(), columns.data(), DType::f32, M, K, count});
    const PackedLayout& l = w.layout;
    const OutlierProduct product{columns.data(),
                                 outlier.data(),
                                 w.packed.data(),
                                 w.scale.data(),
                                 w.zero_point.data(),
                                 part.data(),
                                 DType::f32,
                                 0,
                                 0,
                                 M,
                                 0,
                                 M,
                                 count,
                                 l,
                                 l.groups(),
                                 l.panel_words()};
    const std::string out = integer_product(w, x, M, true, &product);
    return bytes(flag, columns, part) + out;
  });
}

template <class Real>
void solvers(const char* gptq, const char* descent) {
  using G = Gptq<Real>;
  using D = CoordinateDescent<Real>;
  const int64_t rows = 600;  // three tasks
  const Data<float> w = numbers(rows * K);
  const Data<float> noise = numbers(K * K, 0.02f);
  Data<Real> c(K * K), h(K * K);
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = 0; j < K; ++j) {
      c[size_t(i * K + j)] = i < j ? Real(noise[size_t(i * K + j)]) : Real(0);
      h[size_t(i * K + j)] = i == j ? Real(1) : Real(noise[size_t(i < j ? i * K + j : j * K + i)]);
    }
  Data<uint8_t> q(rows * K), z(rows * groups);
  Data<float> s(rows * groups);
  check(gptq, [&] {
    const int64_t panels = ceil_div(rows, G::panel);
    G args{w.data(),           c.data(),   nullptr, nullptr, nullptr, nullptr, q.data(), s.data(),
           z.data(),           DType::f32, rows,    K,       group,   groups,  32,       3,
           GroupFit::in_order, grid};
    Data<Real> work(panels * args.work_columns() * G::panel);
    Data<Real> group_work(args.tasks() * group * G::panel);
    args.work = work.data();
    args.group_work = group_work.data();
    run(args);
    return bytes(q, s, z);
  });
  check(descent, [&] {
    Data<uint8_t> better = q;
    D args{w.data(), h.data(), s.data(), z.data(), better.data(), nullptr, DType::f32, rows, K,
           group,    groups,   2,        4};
    Data<Real> work(ceil_div(rows, D::panel) * args.work_columns() * D::panel);
    args.work = work.data();
    run(args);
    return bytes(better);
  });
}

}  // namespace

int main() {
  for (int level = 0; level <= int(cpu::best_isa()); ++level) {
    cpu::set_isa(Isa(level));
    grids();
    candidates();
    statistics();
    rotations();
    layouts();
    tokens();
    products();
    solvers<float>("gptq", "coordinate_descent");
    solvers<double>("gptq, double", "coordinate_descent, double");
    printf("%s: every kernel on four threads\n", cpu::isa_name(cpu::isa()));
  }
  return failures == 0 ? 0 : 1;
}
