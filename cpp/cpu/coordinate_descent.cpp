#include "fewbit/coordinate_descent.h"

#include "update.h"

namespace fewbit::cpu::FEWBIT_ISA {

constexpr int lanes = update_lanes, vectors = update_vectors;
static_assert(CoordinateDescent::panel == lanes && CoordinateDescent::padding >= update_columns);

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// One column of one panel as floats, rows past the end 0.
struct Column {
  float code[lanes], scale[lanes], zero[lanes];
};

static Column load_column(const CoordinateDescent& a, int64_t panel, int64_t k) {
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
template <class T>
static void errors(const CoordinateDescent& a, int64_t panel, int64_t begin, int64_t end,
                   float* e) {
  for (int64_t k = begin; k < end; ++k) {
    const Column c = load_column(a, panel, k);
    for (int r = 0; r < lanes; ++r) {
      const int64_t row = panel * lanes + r;
      const float w =
          row < a.rows ? to_float(static_cast<const T*>(a.w)[row * a.columns + k]) : 0.0f;
      e[(k - begin) * lanes + r] = w - (c.code[r] - c.zero[r]) * c.scale[r];
    }
  }
}

// Visits columns [begin, end) of one panel; e becomes the change of w - w', which g has seen inside
// the block only.
static void visit(const CoordinateDescent& a, int64_t panel, float* g, int64_t begin, int64_t end,
                  float* e) {
  const F32 qmax = F32::set(float((1 << a.bits) - 1));
  for (int64_t k = begin; k < end; ++k) {
    Column c = load_column(a, panel, k);
    const float* h = a.h + k * a.columns;
    for (int v = 0; v < vectors; ++v) {
      const int at = v * F32::width;
      const F32 s = F32::load(c.scale + at), z = F32::load(c.zero + at);
      const F32 old = F32::load(c.code + at), from = (old - z) * s;
      const F32 t = from + F32::load(g + k * lanes + at) / F32::set(h[k]);
      const F32 q = min(max(round(t / s) + z, F32::zero()), qmax);
      const F32 d = from - (q - z) * s;
      q.store(c.code + at);
      d.store(e + (k - begin) * lanes + at);
      for (int64_t i = begin; i < end; ++i) {
        float* x = g + i * lanes + at;
        fma(d, F32::set(h[i]), F32::load(x)).store(x);
      }
    }
    for (int r = 0; r < lanes && panel * lanes + r < a.rows; ++r)
      a.q[(panel * lanes + r) * a.columns + k] = uint8_t(c.code[r]);
  }
}

template <class T>
static void descend(const CoordinateDescent& a, int64_t task) {
  constexpr int64_t block = CoordinateDescent::block, e_stride = block * lanes;
  const int64_t first = task * CoordinateDescent::task_panels;
  const int64_t last = least(first + CoordinateDescent::task_panels, a.panels());
  const int64_t stride = a.work_columns() * lanes;
  float* g = a.work + first * stride;
  float e[CoordinateDescent::task_panels * e_stride];
  for (int64_t i = 0; i < (last - first) * stride; ++i) g[i] = 0.0f;
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

void kernel(const CoordinateDescent& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    with_type(a.dtype, [&](auto* t) { descend<element<decltype(t)>>(a, task); });
}

}  // namespace fewbit::cpu::FEWBIT_ISA
