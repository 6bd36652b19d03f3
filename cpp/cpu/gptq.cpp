#include "fewbit/gptq.h"

#include "grid.h"
#include "update.h"

namespace fewbit::cpu::FEWBIT_ISA {

constexpr int lanes = update_lanes, vectors = update_vectors;
static_assert(Gptq::panel == update_lanes && Gptq::padding >= update_columns);

// Scales and zero points of one group, one row per lane.
struct Steps {
  float s[lanes];
  float z[lanes];
};

static F32 codes_of(F32 w, F32 s, F32 z, F32 qmax) {
  return min(max(round(w / s) + z, F32::zero()), qmax);
}

// The column of w that is solved k-th.
static int64_t column_at(const Gptq& a, int64_t k) { return a.order ? a.order[k] : k; }

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// w of one panel into x [columns][16], in solving order or in that of w; rows past the end are 0.
template <class T>
static void fill(const Gptq& a, int64_t panel, float* x, int64_t begin, int64_t end, bool ordered) {
  constexpr int64_t chunk = 128;  // columns: both sides of the transposition stay in cache
  for (int64_t start = begin; start < end; start += chunk) {
    const int64_t stop = least(start + chunk, end);
    for (int r = 0; r < lanes; ++r) {
      const int64_t row = panel * lanes + r;
      const T* w = static_cast<const T*>(a.w) + (row < a.rows ? row : 0) * a.columns;
      float* out = x + r - begin * lanes;
      if (row >= a.rows)
        for (int64_t k = start; k < stop; ++k) out[k * lanes] = 0.0f;
      else if (ordered && a.order)
        for (int64_t k = start; k < stop; ++k) out[k * lanes] = to_float(w[a.order[k]]);
      else
        for (int64_t k = start; k < stop; ++k) out[k * lanes] = to_float(w[k]);
    }
  }
}

// x[i] += d c[i] for columns [begin, end) of one vector of rows.
FEWBIT_INLINE void compensate(F32 d, const float* c, float* x, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    fma(d, F32::set(c[i]), F32::load(x + i * lanes)).store(x + i * lanes);
}

// Steps of the ranges lo .. hi of each lane.
static void make_steps(const float* lo, const float* hi, const Grid& grid, Steps* out) {
  for (int r = 0; r < lanes; ++r) {
    const Step g = make_step(lo[r], hi[r], grid);
    out->s[r] = g.s;
    out->z[r] = g.z;
  }
}

// sum of importance (x - x')^2 over n columns; columns[i] (or first + i) is column i in w.
static void range_loss(const Gptq& a, const float* x, int64_t n, const int64_t* columns,
                       int64_t first, const Steps& g, float* loss) {
  const F32 qmax = F32::set(float((1 << a.grid.bits) - 1));
  for (int v = 0; v < vectors; ++v) {
    const F32 s = F32::load(g.s + v * F32::width), z = F32::load(g.z + v * F32::width);
    F32 sum = F32::zero();
    for (int64_t i = 0; i < n; ++i) {
      const F32 w = F32::load(x + i * lanes + v * F32::width);
      const F32 d = w - (codes_of(w, s, z, qmax) - z) * s;
      const F32 h = F32::set(a.importance ? a.importance[columns ? columns[i] : first + i] : 1.0f);
      sum = fma(d * h, d, sum);
    }
    sum.store(loss + v * F32::width);
  }
}

// The grid of group `group` of one panel from its n weights x [n][16].
static void fit_group(const Gptq& a, int64_t panel, int64_t group, const float* x, int64_t n,
                      const int64_t* columns, int64_t first) {
  float lo[lanes], hi[lanes];
  for (int v = 0; v < vectors; ++v) {
    F32 low = F32::zero(), high = F32::zero();
    for (int64_t i = 0; i < n; ++i) {
      const F32 w = F32::load(x + i * lanes + v * F32::width);
      low = min(w, low);
      high = max(w, high);
    }
    low.store(lo + v * F32::width);
    high.store(hi + v * F32::width);
  }
  Steps best;
  make_steps(lo, hi, a.grid, &best);
  if (a.points > 0) {
    float least_loss[lanes], loss[lanes], low[lanes], high[lanes];
    range_loss(a, x, n, columns, first, best, least_loss);
    for (int64_t i = 1; i < a.points; ++i) {
      const float keep = 1.0f - 0.8f * float(i) / float(a.points);
      for (int r = 0; r < lanes; ++r) {
        low[r] = keep * lo[r];
        high[r] = keep * hi[r];
      }
      Steps tried;
      make_steps(low, high, a.grid, &tried);
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
template <class T>
static void expect(const Gptq& a, int64_t panel, const float* x, int64_t k, int64_t n, float* out) {
  for (int64_t i = 0; i < n * lanes; ++i) out[i] = x[i];
  if (k == 0) return;  // nothing has been rounded yet: they are w
  for (int64_t j = 0; j < n; ++j) {
    float original[lanes];
    fill<T>(a, panel, original, k + j, k + j + 1, true);
    for (int v = 0; v < vectors; ++v) {
      const int at = v * F32::width;
      compensate(F32::load(original + at) - F32::load(out + j * lanes + at),
                 a.c + (k + j) * a.columns + k, out + at, j + 1, n);
    }
  }
}

static Steps steps_of(const Gptq& a, int64_t panel, int64_t group) {
  Steps g;
  for (int r = 0; r < lanes; ++r) {
    const int64_t row = panel * lanes + r;
    g.s[r] = row < a.rows ? a.scale[row * a.groups + group] : 1.0f;
    g.z[r] = row < a.rows ? float(a.zero_point[row * a.groups + group]) : 0.0f;
  }
  return g;
}

// Columns of the group that is reached at position k, which are adjacent in solving order.
static int64_t group_length(const Gptq& a, int64_t k) {
  const int64_t group = column_at(a, k) / a.group_size;
  return least(a.group_size, a.columns - group * a.group_size);
}

// Where the block that begins at k ends: a group that is fitted in order begins a new block unless
// all of it lies inside, because its fit needs every update.
static int64_t block_end(const Gptq& a, int64_t k) {
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
template <class T>
static void solve_block(const Gptq& a, int64_t panel, float* x, int64_t begin, int64_t end,
                        float* group_work) {
  float original[Gptq::max_block * lanes];
  fill<T>(a, panel, original, begin, end, true);
  const F32 qmax = F32::set(float((1 << a.grid.bits) - 1));
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
    float code[lanes];
    for (int v = 0; v < vectors; ++v) {
      const int at = v * F32::width;
      const F32 s = F32::load(g.s + at), z = F32::load(g.z + at);
      const F32 q = codes_of(F32::load(x + k * lanes + at), s, z, qmax);
      q.store(code + at);
      const F32 d = F32::load(original + (k - begin) * lanes + at) - (q - z) * s;
      d.store(x + k * lanes + at);
      compensate(d, a.c + k * a.columns, x + at, k + 1, end);
    }
    for (int r = 0; r < lanes && panel * lanes + r < a.rows; ++r)
      a.q[(panel * lanes + r) * a.columns + column] = uint8_t(code[r]);
  }
}

template <class T>
static void solve(const Gptq& a, int64_t task) {
  const int64_t first = task * Gptq::task_panels;
  const int64_t last = least(first + Gptq::task_panels, a.panels());
  float* group_work = a.group_work + task * a.group_size * lanes;
  const int64_t stride = a.work_columns() * lanes;
  for (int64_t p = first; p < last; ++p) {
    float* x = a.work + p * stride;
    if (a.fit == GroupFit::before) {
      fill<T>(a, p, x, 0, a.columns, false);
      for (int64_t group = 0; group < a.groups; ++group) {
        const int64_t start = group * a.group_size;
        fit_group(a, p, group, x + start * lanes, least(a.group_size, a.columns - start), nullptr,
                  start);
      }
    }
    fill<T>(a, p, x, 0, a.columns, true);
    for (int64_t i = a.columns * lanes; i < stride; ++i) x[i] = 0.0f;
  }
  for (int64_t begin = 0; begin < a.columns;) {
    const int64_t end = block_end(a, begin);
    for (int64_t p = first; p < last; ++p)
      solve_block<T>(a, p, a.work + p * stride, begin, end, group_work);
    float* x = a.work + first * stride;
    update<Gptq::max_block>(x + begin * lanes, stride, x + end * lanes, stride, last - first,
                            a.c + begin * a.columns + end, a.columns, end - begin, a.columns - end);
    begin = end;
  }
}

void kernel(const Gptq& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    with_type(a.dtype, [&](auto* t) { solve<element<decltype(t)>>(a, task); });
}

}  // namespace fewbit::cpu::FEWBIT_ISA
