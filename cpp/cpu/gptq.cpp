#include "fewbit/gptq.h"

#include "grid.h"
#include "update.h"

namespace fewbit::cpu::FEWBIT_ISA {

constexpr int lanes = update_lanes;
template <class Real>
constexpr int vectors = update_vectors<Real>;

// Scales and zero points of one group, one row per lane.
struct Steps {
  float s[lanes];
  float z[lanes];
};

template <class V>
FEWBIT_INLINE V codes_of(V w, V s, V z, V qmax) {
  return min(max(round(w / s) + z, V::zero()), qmax);
}

// The column of w that is solved k-th.
template <class Real>
static int64_t column_at(const Gptq<Real>& a, int64_t k) {
  return a.order ? a.order[k] : k;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// w of one panel into x [columns][16], in solving order or in that of w; rows past the end are 0.
template <class T, class Real>
static void fill(const Gptq<Real>& a, int64_t panel, Real* x, int64_t begin, int64_t end,
                 bool ordered) {
  constexpr int64_t chunk = 128;  // columns: both sides of the transposition stay in cache
  for (int64_t start = begin; start < end; start += chunk) {
    const int64_t stop = least(start + chunk, end);
    for (int r = 0; r < lanes; ++r) {
      const int64_t row = panel * lanes + r;
      const T* w = static_cast<const T*>(a.w) + (row < a.rows ? row : 0) * a.columns;
      Real* out = x + r - begin * lanes;
      if (row >= a.rows)
        for (int64_t k = start; k < stop; ++k) out[k * lanes] = 0;
      else if (ordered && a.order)
        for (int64_t k = start; k < stop; ++k) out[k * lanes] = to_float(w[a.order[k]]);
      else
        for (int64_t k = start; k < stop; ++k) out[k * lanes] = to_float(w[k]);
    }
  }
}

// x[i] += d c[i] for columns [begin, end) of one vector of rows.
template <class Real>
FEWBIT_INLINE void compensate(Vector<Real> d, const Real* c, Real* x, int64_t begin, int64_t end) {
  using V = Vector<Real>;
  for (int64_t i = begin; i < end; ++i)
    fma(d, V::set(c[i]), V::load(x + i * lanes)).store(x + i * lanes);
}

// sum of importance (x - x')^2 over n columns; columns[i] (or first + i) is column i in w.
template <class Real>
static void range_loss(const Gptq<Real>& a, const Real* x, int64_t n, const int64_t* columns,
                       int64_t first, const Steps& g, Real* loss) {
  using V = Vector<Real>;
  const V qmax = V::set(Real((1 << a.grid.bits) - 1));
  for (int v = 0; v < vectors<Real>; ++v) {
    const V s = V::load(g.s + v * V::width), z = V::load(g.z + v * V::width);
    V sum = V::zero();
    for (int64_t i = 0; i < n; ++i) {
      const V w = V::load(x + i * lanes + v * V::width);
      const V d = w - (codes_of(w, s, z, qmax) - z) * s;
      const V h = V::set(a.importance ? a.importance[columns ? columns[i] : first + i] : Real(1));
      sum = fma(d * h, d, sum);
    }
    sum.store(loss + v * V::width);
  }
}

// The grid of group `group` of one panel from its n weights x [n][16].
template <class Real>
static void fit_group(const Gptq<Real>& a, int64_t panel, int64_t group, const Real* x, int64_t n,
                      const int64_t* columns, int64_t first) {
  using V = Vector<Real>;
  Real lows[lanes], highs[lanes];
  for (int v = 0; v < vectors<Real>; ++v) {
    V low = V::zero(), high = V::zero();
    for (int64_t i = 0; i < n; ++i) {
      const V w = V::load(x + i * lanes + v * V::width);
      low = min(w, low);
      high = max(w, high);
    }
    low.store(lows + v * V::width);
    high.store(highs + v * V::width);
  }
  float lo[lanes], hi[lanes];
  for (int r = 0; r < lanes; ++r) {
    lo[r] = float(lows[r]);
    hi[r] = float(highs[r]);
  }
  Steps best;
  make_steps(lo, hi, lanes, a.grid, best.s, best.z);
  if (a.points > 0) {
    Real least_loss[lanes], loss[lanes];
    float low[lanes], high[lanes];
    range_loss(a, x, n, columns, first, best, least_loss);
    for (int64_t i = 1; i < a.points; ++i) {
      const float keep = 1.0f - 0.8f * float(i) / float(a.points);
      for (int r = 0; r < lanes; ++r) {
        low[r] = keep * lo[r];
        high[r] = keep * hi[r];
      }
      Steps tried;
      make_steps(low, high, lanes, a.grid, tried.s, tried.z);
      range_loss(a, x, n, columns, first, tried, loss);
      for (int r = 0; r < lanes; ++r)
        if (loss[r] < least_loss[r]) {
          least_loss[r] = loss[r];
          best.s[r] = tried.s[r];
          best.z[r] = tried.z[r];
        }
    }
  }
  for (int r = 0; r < lanes && panel * lanes + r < a.rows; ++r) {
    const int64_t at = (panel * lanes + r) * a.groups + group;
    a.scale[at] = best.s[r];
    a.zero_point[at] = uint8_t(best.z[r]);
  }
}

// The best weights of a group given the columns before it, into `out` [n][16] from targets x.
template <class T, class Real>
static void expect(const Gptq<Real>& a, int64_t panel, const Real* x, int64_t k, int64_t n,
                   Real* out) {
  using V = Vector<Real>;
  for (int64_t i = 0; i < n * lanes; ++i) out[i] = x[i];
  if (k == 0) return;  // nothing has been rounded yet: they are w
  for (int64_t j = 0; j < n; ++j) {
    Real original[lanes];
    fill<T>(a, panel, original, k + j, k + j + 1, true);
    for (int v = 0; v < vectors<Real>; ++v) {
      const int at = v * V::width;
      compensate(V::load(original + at) - V::load(out + j * lanes + at),
                 a.c + (k + j) * a.columns + k, out + at, j + 1, n);
    }
  }
}

template <class Real>
static Steps steps_of(const Gptq<Real>& a, int64_t panel, int64_t group) {
  Steps g;
  for (int r = 0; r < lanes; ++r) {
    const int64_t row = panel * lanes + r;
    g.s[r] = row < a.rows ? a.scale[row * a.groups + group] : 1.0f;
    g.z[r] = row < a.rows ? float(a.zero_point[row * a.groups + group]) : 0.0f;
  }
  return g;
}

// Columns of the group that is reached at position k, which are adjacent in solving order.
template <class Real>
static int64_t group_length(const Gptq<Real>& a, int64_t k) {
  const int64_t group = column_at(a, k) / a.group_size;
  return least(a.group_size, a.columns - group * a.group_size);
}

// Where the block that begins at k ends: a group that is fitted in order begins a new block unless
// all of it lies inside, because its fit needs every update.
template <class Real>
static int64_t block_end(const Gptq<Real>& a, int64_t k) {
  const int64_t end = least(k + a.block, a.columns);
  if (a.fit != GroupFit::in_order) return end;
  for (int64_t at = k; at < end;) {
    // The first block inside a long group has its start at k; later ones meet no start at all.
    const bool starts =
        at == 0 || column_at(a, at) / a.group_size != column_at(a, at - 1) / a.group_size;
    if (starts && at > k && at + group_length(a, at) > end) return at;
    at += starts ? group_length(a, at) : 1;
  }
  return end;
}

// Rounds columns [begin, end) of one panel and compensates inside the block; x becomes w - w'.
template <class T, class Real>
static void solve_block(const Gptq<Real>& a, int64_t panel, Real* x, int64_t begin, int64_t end,
                        Real* group_work) {
  using V = Vector<Real>;
  Real original[Gptq<Real>::max_block * lanes];
  fill<T>(a, panel, original, begin, end, true);
  const V qmax = V::set(Real((1 << a.grid.bits) - 1));
  int64_t group = -1;
  Steps g{};
  for (int64_t k = begin; k < end; ++k) {
    const int64_t column = column_at(a, k);
    if (column / a.group_size != group) {
      const bool entered = k == 0 || column_at(a, k - 1) / a.group_size != column / a.group_size;
      group = column / a.group_size;
      if (a.fit == GroupFit::in_order && entered) {
        const int64_t n = group_length(a, k);
        expect<T>(a, panel, x + k * lanes, k, n, group_work);
        fit_group(a, panel, group, group_work, n, a.order ? a.order + k : nullptr, k);
      }
      g = steps_of(a, panel, group);
    }
    Real code[lanes];
    for (int v = 0; v < vectors<Real>; ++v) {
      const int at = v * V::width;
      const V s = V::load(g.s + at), z = V::load(g.z + at);
      const V q = codes_of(V::load(x + k * lanes + at), s, z, qmax);
      q.store(code + at);
      const V d = V::load(original + (k - begin) * lanes + at) - (q - z) * s;
      d.store(x + k * lanes + at);
      compensate(d, a.c + k * a.columns, x + at, k + 1, end);
    }
    for (int r = 0; r < lanes && panel * lanes + r < a.rows; ++r)
      a.q[(panel * lanes + r) * a.columns + column] = uint8_t(code[r]);
  }
}

template <class T, class Real>
static void solve(const Gptq<Real>& a, int64_t task) {
  const int64_t first = task * Gptq<Real>::task_panels;
  const int64_t last = least(first + Gptq<Real>::task_panels, a.panels());
  Real* group_work = a.group_work + task * a.group_size * lanes;
  const int64_t stride = a.work_columns() * lanes;
  for (int64_t p = first; p < last; ++p) {
    Real* x = a.work + p * stride;
    if (a.fit == GroupFit::before) {
      fill<T>(a, p, x, 0, a.columns, false);
      for (int64_t group = 0; group < a.groups; ++group) {
        const int64_t start = group * a.group_size;
        fit_group(a, p, group, x + start * lanes, least(a.group_size, a.columns - start), nullptr,
                  start);
      }
    }
    fill<T>(a, p, x, 0, a.columns, true);
    for (int64_t i = a.columns * lanes; i < stride; ++i) x[i] = 0;
  }
  for (int64_t begin = 0; begin < a.columns;) {
    const int64_t end = block_end(a, begin);
    for (int64_t p = first; p < last; ++p)
      solve_block<T>(a, p, a.work + p * stride, begin, end, group_work);
    Real* x = a.work + first * stride;
    update<Gptq<Real>::max_block>(x + begin * lanes, stride, x + end * lanes, stride, last - first,
                                  a.c + begin * a.columns + end, a.columns, end - begin,
                                  a.columns - end);
    begin = end;
  }
}

template <class Real>
static void solve_tasks(const Gptq<Real>& a, int64_t begin, int64_t end) {
  static_assert(Gptq<Real>::panel == lanes && Gptq<Real>::padding >= update_columns<Real>);
  for (int64_t task = begin; task < end; ++task)
    with_type(a.dtype, [&](auto* t) { solve<element<decltype(t)>>(a, task); });
}

void kernel(const Gptq<float>& a, int64_t begin, int64_t end) { solve_tasks(a, begin, end); }
void kernel(const Gptq<double>& a, int64_t begin, int64_t end) { solve_tasks(a, begin, end); }

}  // namespace fewbit::cpu::FEWBIT_ISA
