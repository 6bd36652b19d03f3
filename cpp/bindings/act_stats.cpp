#include "fewbit/act_stats.h"

#include "cuda.h"

namespace fewbit::bindings {

void act_stats(const Tensor& x, Tensor sum_abs, Tensor max_abs) {
  check_matrix(x, "x", "[tokens, channels]");
  const int64_t tokens = x.size(0), channels = x.size(1);
  check_dtype(sum_abs, ScalarType::Double, "sum_abs");
  check_dtype(max_abs, ScalarType::Float, "max_abs");
  check_shape(sum_abs, {channels}, "sum_abs");
  check_shape(max_abs, {channels}, "max_abs");
  check(sum_abs.is_contiguous() && max_abs.is_contiguous(),
        "sum_abs and max_abs must be contiguous: they are updated in place");
  const DType dtype = dtype_of(x, "x");
  const Tensor in = dense(x);
  run_on(x,
         ActStats{in.const_data_ptr(), mutable_data<double>(sum_abs), mutable_data<float>(max_abs),
                  dtype, tokens, channels},
         "act_stats", grain_for(tokens * ActStats::block));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def("act_stats(Tensor x, Tensor(a!) sum_abs, Tensor(b!) max_abs) -> ()");
}
FEWBIT_OP(act_stats)

}  // namespace fewbit::bindings
