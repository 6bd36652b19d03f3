#include "fewbit/coordinate_descent.h"

#include "update.h"

namespace fewbit::cpu::FEWBIT_ISA {

constexpr int lanes = update_lanes;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// One column of one panel as floats, rows past the end 0.
struct Column {
  float code[lanes], scale[lanes], zero[lanes];
};

template <class Real>
static Column load_column(const CoordinateDescent<Real>& a, int64_t panel, int64_t k) {
  Column c;
  for (int r = 0; r < lanes; ++r) {
    const int64_t row = panel * lanes + r;
    const bool real = row < a.rows;
    const int64_t group = row * a.groups + k / a.group_size;
    c.code[r] = real ? float(a.q[row * a.columns + k]) : 0.0f;
    c.scale[r] = real ? a.scale[group] : 1.0f;
    c.zero[r] = real ? float(a.zero_point[group]) : 0.0f;
  }
  return c;
}

// w - w' of columns [begin, end) of one panel into e [end - begin][16].
template <class T, class Real>
static void errors(const CoordinateDescent<Real>& a, int64_t panel, int64_t begin, int64_t end,
                   Real* e) {
  for (int64_t k = begin; k < end; ++k) {
    const Column c = load_column(a, panel, k);
    for (int r = 0; r < lanes; ++r) {
      const int64_t row = panel * lanes + r;
      const Real w =
          row < a.rows ? to_float(static_cast<const T*>(a.w)[row * a.columns + k]) : 0.0f;
      e[(k - begin) * lanes + r] = w - Real(c.code[r] - c.zero[r]) * Real(c.scale[r]);
    }
  }
}

// Visits columns [begin, end) of one panel; e becomes the change of w - w', which g has seen inside
// the block only.
template <class Real>
static void visit(const CoordinateDescent<Real>& a, int64_t panel, Real* g, int64_t begin,
                  int64_t end, Real* e) {
  using V = Vector<Real>;
  const V qmax = V::set(Real((1 << a.bits) - 1));
  for (int64_t k = begin; k < end; ++k) {
    const Column c = load_column(a, panel, k);
    const Real* h = a.h + k * a.columns;
    Real code[lanes];
    for (int v = 0; v < update_vectors<Real>; ++v) {
      const int at = v * V::width;
      const V s = V::load(c.scale + at), z = V::load(c.zero + at);
      const V old = V::load(c.code + at), from = (old - z) * s;
      const V t = from + V::load(g + k * lanes + at) / V::set(h[k]);
      const V q = min(max(round(t / s) + z, V::zero()), qmax);
      const V d = from - (q - z) * s;
      q.store(code + at);
      d.store(e + (k - begin) * lanes + at);
      for (int64_t i = begin; i < end; ++i) {
        Real* x = g + i * lanes + at;
        fma(d, V::set(h[i]), V::load(x)).store(x);
      }
    }
    for (int r = 0; r < lanes && panel * lanes + r < a.rows; ++r)
      a.q[(panel * lanes + r) * a.columns + k] = uint8_t(code[r]);
  }
}

template <class T, class Real>
static void descend(const CoordinateDescent<Real>& a, int64_t task) {
  using Args = CoordinateDescent<Real>;
  static_assert(Args::panel == lanes && Args::padding >= update_columns<Real>);
  constexpr int64_t block = Args::block, e_stride = block * lanes;
  const int64_t first = task * Args::task_panels;
  const int64_t last = least(first + Args::task_panels, a.panels());
  const int64_t stride = a.work_columns() * lanes;
  Real* g = a.work + first * stride;
  Real e[Args::task_panels * e_stride];
  for (int64_t i = 0; i < (last - first) * stride; ++i) g[i] = 0;
  // Columns [to, to + width) of g += e H for the rows of H that belong to a block.
  const auto add = [&](int64_t begin, int64_t end, int64_t to, int64_t width) {
    update<block>(e, e_stride, g + to * lanes, stride, last - first, a.h + begin * a.columns + to,
                  a.columns, end - begin, width);
  };
  for (int64_t begin = 0; begin < a.columns; begin += block) {
    const int64_t end = least(begin + block, a.columns);
    for (int64_t p = first; p < last; ++p) errors<T>(a, p, begin, end, e + (p - first) * e_stride);
    add(begin, end, 0, a.columns);
  }
  for (int64_t sweep = 0; sweep < a.sweeps; ++sweep)
    for (int64_t begin = 0; begin < a.columns; begin += block) {
      const int64_t end = least(begin + block, a.columns);
      for (int64_t p = first; p < last; ++p)
        visit(a, p, g + (p - first) * stride, begin, end, e + (p - first) * e_stride);
      add(begin, end, 0, begin);
      add(begin, end, end, a.columns - end);
    }
}

template <class Real>
static void descend_tasks(const CoordinateDescent<Real>& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    with_type(a.dtype, [&](auto* t) { descend<element<decltype(t)>>(a, task); });
}

void kernel(const CoordinateDescent<float>& a, int64_t begin, int64_t end) {
  descend_tasks(a, begin, end);
}
void kernel(const CoordinateDescent<double>& a, int64_t begin, int64_t end) {
  descend_tasks(a, begin, end);
}

}  // namespace fewbit::cpu::FEWBIT_ISA
