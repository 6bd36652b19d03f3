#include "fewbit/coordinate_descent.h"

#include "interrupt.h"
#include "op.h"

namespace fewbit::bindings {

namespace {

template <class Real>
void descend(const Tensor& w, const Tensor& h, const Tensor& scale, const Tensor& zero_point,
             Tensor& q, int64_t bits, int64_t group, int64_t sweeps) {
  using Args = CoordinateDescent<Real>;
  const int64_t rows = w.size(0), columns = w.size(1), groups = scale.size(1);
  const DType dtype = dtype_of(w, "w");
  const int64_t pass = rows_per_pass<Args>(rows);
  Tensor work =
      empty({(pass + Args::panel - 1) / Args::panel, columns + Args::padding, Args::panel},
            real_type<Real>);
  Interrupt interrupt;
  for (int64_t first = 0; first < rows && !interrupt.stopped(); first += pass) {
    const int64_t n = first + pass <= rows ? pass : rows - first;
    run(Args{data<char>(w) + first * columns * size_of(dtype), data<Real>(h),
             data<float>(scale) + first * groups, data<uint8_t>(zero_point) + first * groups,
             mutable_data<uint8_t>(q) + first * columns, mutable_data<Real>(work), dtype, n,
             columns, group, groups, sweeps, static_cast<int>(bits)},
        1, interrupt);
  }
}

}  // namespace

Tensor coordinate_descent(const Tensor& w, const Tensor& h, const Tensor& q, const Tensor& scale,
                          const Tensor& zero_point, int64_t bits, int64_t group_size,
                          int64_t sweeps) {
  check_matrix(w, "w", "[out_features, in_features]");
  const int64_t rows = w.size(0), columns = w.size(1);
  const int64_t group = resolve_group(group_size, columns);
  const int64_t groups = count_groups(columns, group);
  dtype_of(w, "w");
  check(bits >= 2 && bits <= 8, "bits must be in 2..8, got ", bits);
  check_repeats(sweeps, "sweeps");
  const bool wide = is_double(h, "h");
  check_shape(h, {columns, columns}, "h");
  check_dtype(q, ScalarType::Byte, "q");
  check_shape(q, {rows, columns}, "q");
  dtype_of(scale, "scale");
  check_shape(scale, {rows, groups}, "scale");
  check_dtype(zero_point, ScalarType::Byte, "zero_point");
  check_shape(zero_point, {rows, groups}, "zero_point");
  end_of_checks();
  Tensor out = empty({rows, columns}, ScalarType::Byte);
  torch::stable::copy_(out, q);
  const auto descend_as = wide ? descend<double> : descend<float>;
  descend_as(dense(w), dense(h), dense(torch::stable::to(scale, ScalarType::Float)),
             dense(zero_point), out, bits, group, sweeps);
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def(
      "coordinate_descent(Tensor w, Tensor h, Tensor q, Tensor scale, Tensor zero_point, int bits,"
      " int group_size, int sweeps) -> Tensor");
}
FEWBIT_CPU_OP(coordinate_descent)

}  // namespace fewbit::bindings
