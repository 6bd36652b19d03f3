#include "fewbit/gptq.h"

#include <vector>

#include "cuda_product.h"
#include "grid_args.h"
#include "interrupt.h"

namespace fewbit::bindings {

namespace {

GroupFit fit_named(const std::string& text) {
  if (text == "in_order") return GroupFit::in_order;
  check(text == "before", "fit must be in_order or before, got \"", text, "\"");
  return GroupFit::before;
}

// order must name every column once; with groups fitted in order, a group must be one run.
void check_order(const int64_t* order, int64_t columns, int64_t group, bool runs) {
  std::vector<char> column_seen(static_cast<size_t>(columns)),
      group_seen(static_cast<size_t>(columns));
  for (int64_t k = 0; k < columns; ++k) {
    const int64_t column = order[k];
    check(column >= 0 && column < columns && !column_seen[static_cast<size_t>(column)],
          "order must hold every column 0..", columns - 1, " once, got ", column, " at ", k);
    column_seen[static_cast<size_t>(column)] = 1;
    if (!runs || (k > 0 && column / group == order[k - 1] / group)) continue;
    check(!group_seen[static_cast<size_t>(column / group)], "order leaves and re-enters group ",
          column / group, ": fit=in_order needs the columns of a group side by side");
    group_seen[static_cast<size_t>(column / group)] = 1;
  }
}

// Runs over all rows, a pass at a time; s and z are written, or read where the grid is given.
template <class Real>
void solve(const Tensor& w, const Tensor& c, const std::optional<Tensor>& importance,
           const std::optional<Tensor>& order, Tensor& q, Tensor& s, Tensor& z, int64_t group,
           int64_t block, int64_t points, GroupFit fit, const Grid& grid) {
  const int64_t rows = w.size(0), columns = w.size(1), groups = s.size(1);
  const DType dtype = dtype_of(w, "w");
  const int64_t pass = rows_per_pass<Gptq<Real>>(rows);
  const int64_t panels = (pass + Gptq<Real>::panel - 1) / Gptq<Real>::panel;
  const int64_t tasks = (panels + Gptq<Real>::task_panels - 1) / Gptq<Real>::task_panels;
  Tensor work = empty({panels, columns + Gptq<Real>::padding, Gptq<Real>::panel}, real_type<Real>);
  Tensor group_work = empty({tasks, group, Gptq<Real>::panel}, real_type<Real>);
  Interrupt interrupt;
  for (int64_t first = 0; first < rows && !interrupt.stopped(); first += pass) {
    const int64_t n = first + pass <= rows ? pass : rows - first;
    run(Gptq<Real>{data<char>(w) + first * columns * size_of(dtype), data<Real>(c),
                   importance ? data<Real>(*importance) : nullptr,
                   order ? data<int64_t>(*order) : nullptr, mutable_data<Real>(work),
                   mutable_data<Real>(group_work), mutable_data<uint8_t>(q) + first * columns,
                   mutable_data<float>(s) + first * groups,
                   mutable_data<uint8_t>(z) + first * groups, dtype, n, columns, group, groups,
                   block, points, fit, grid},
        1, interrupt);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gptq(const Tensor& w, const Tensor& c, int64_t bits,
                                        int64_t group_size, bool symmetric, std::string scale_dtype,
                                        std::string fit, int64_t points,
                                        std::optional<Tensor> importance,
                                        std::optional<Tensor> order, std::optional<Tensor> scale,
                                        std::optional<Tensor> zero_point, int64_t block) {
  check_matrix(w, "w", "[out_features, in_features]");
  const int64_t rows = w.size(0), columns = w.size(1);
  const int64_t group = resolve_group(group_size, columns);
  const int64_t groups = count_groups(columns, group);
  const Grid grid = make_grid(bits, symmetric, scale_dtype);
  dtype_of(w, "w");
  const bool wide = is_double(c, "c");
  check_shape(c, {columns, columns}, "c");
  check_repeats(points, "points");
  check(block >= 1 && block <= Gptq<float>::max_block, "block must be in 1..",
        Gptq<float>::max_block, ", got ", block);
  check(scale.has_value() == zero_point.has_value(),
        "scale and zero_point must be given together, or neither");
  GroupFit group_fit = fit_named(fit);
  if (scale) group_fit = GroupFit::given;
  std::optional<Tensor> weights, at;
  if (importance) {
    check_dtype(*importance, c.scalar_type(), "importance");
    check_shape(*importance, {columns}, "importance");
    weights = dense(*importance);
  }
  if (order) {
    check_dtype(*order, ScalarType::Long, "order");
    check_shape(*order, {columns}, "order");
    at = dense(*order);
  }
  if (scale) {
    check_shape(*scale, {rows, groups}, "scale");
    check_dtype(*zero_point, ScalarType::Byte, "zero_point");
    check_shape(*zero_point, {rows, groups}, "zero_point");
  }
  end_of_checks();
  if (at) {  // a kernel would read where it points: worth the wait for the card
    const Tensor here =
        at->is_cpu() ? *at : torch::stable::to(*at, torch::headeronly::DeviceType::CPU);
    check_order(data<int64_t>(here), columns, group, group_fit == GroupFit::in_order);
  }
  Tensor s = empty_on(w, {rows, groups}, ScalarType::Float);
  Tensor z = empty_on(w, {rows, groups}, ScalarType::Byte);
  if (scale) {
    torch::stable::copy_(s, *scale);
    torch::stable::copy_(z, *zero_point);
  }
  Tensor q = empty_on(w, {rows, columns}, ScalarType::Byte);
#if FEWBIT_WITH_CUDA
  if (architecture_of(w) != 0) {
    const Tensor in = dense(w), coefficients = dense(c);
    cuda::GptqRows a{};
    a.w = in.const_data_ptr();
    a.dtype = dtype_of(w, "w");
    a.rows = rows;
    a.columns = columns;
    a.group_size = group;
    a.groups = groups;
    a.points = points;
    a.fit = group_fit;
    a.grid = grid;
    if (wide || !cuda::serves(a))
      return call<std::tuple<Tensor, Tensor, Tensor>>("fewbit_plain::gptq", w, c, bits, group_size,
                                                      symmetric, scale_dtype, fit, points,
                                                      importance, order, scale, zero_point, block);
    Tensor targets = empty_on(w, {rows, columns}, ScalarType::Float);
    Tensor errors = empty_on(w, {rows, cuda::gptq_block}, ScalarType::Float);
    a.c = data<float>(coefficients);
    a.importance = weights ? data<float>(*weights) : nullptr;
    a.order = at ? data<int64_t>(*at) : nullptr;
    a.targets = mutable_data<float>(targets);
    a.errors = mutable_data<float>(errors);
    a.q = mutable_data<uint8_t>(q);
    a.scale = mutable_data<float>(s);
    a.zero_point = mutable_data<uint8_t>(z);
    run_cuda(w, a, "gptq");
    if (grid.scale_dtype != DType::f32) s = torch::stable::to(s, scalar_type(grid.scale_dtype));
    return {q, s, z};
  }
#endif
  const auto solve_as = wide ? solve<double> : solve<float>;
  solve_as(dense(w), dense(c), weights, at, q, s, z, group, block, points, group_fit, grid);
  if (grid.scale_dtype != DType::f32)  // exact: the kernel has rounded
    s = torch::stable::to(s, scalar_type(grid.scale_dtype));
  return {q, s, z};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "gptq(Tensor w, Tensor c, int bits, int group_size, bool symmetric, str scale_dtype, str fit,"
      " int points, Tensor? importance, Tensor? order, Tensor? scale, Tensor? zero_point, int "
      "block)"
      " -> (Tensor q, Tensor scale, Tensor zero_point)");
}
FEWBIT_OP(gptq)

}  // namespace fewbit::bindings
