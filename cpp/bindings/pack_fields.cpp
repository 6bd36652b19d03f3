#include "fewbit/pack_fields.h"

#include "op.h"

namespace fewbit::bindings {

Tensor pack_fields(const Tensor& q, int64_t bits, bool interleave) {
  check_matrix(q, "q", "[rows, columns]");
  check_dtype(q, ScalarType::Byte, "q");
  check(bits >= 2 && bits <= 8, "bits must be in 2..8, got ", bits);
  const int64_t rows = q.size(0), columns = q.size(1);
  check(!interleave || (bits == 4 && rows % 8 == 0),
        "interleaving needs 4 bits and rows in eights, got ", bits, " bits and ", rows, " rows");
  const Tensor codes = dense(q);
  Tensor out = interleave ? empty({rows / 8, columns}, ScalarType::Int)
                          : empty({rows, (columns * bits + 31) / 32}, ScalarType::Int);
  run(PackFields{data<uint8_t>(codes), mutable_data<uint32_t>(out), rows, columns,
                 static_cast<int>(bits), interleave},
      grain_for(columns * (interleave ? 8 : 1), 1 << 18));
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def("pack_fields(Tensor q, int bits, bool interleave=False) -> Tensor");
}
FEWBIT_CPU_OP(pack_fields)

}  // namespace fewbit::bindings
