#include "fewbit/unpack_fields.h"

#include "op.h"

namespace fewbit::bindings {

Tensor unpack_fields(const Tensor& words, int64_t bits, int64_t columns, bool interleave) {
  check_matrix(words, "words", "[rows, words]");
  check_dtype(words, ScalarType::Int, "words");
  check(bits >= 2 && bits <= 8, "bits must be in 2..8, got ", bits);
  check(!interleave || bits == 4, "interleaving needs 4 bits, got ", bits);
  const int64_t stored = words.size(1), rows = words.size(0) * (interleave ? 8 : 1);
  // columns is bounded first, so that the product cannot overflow
  check(columns >= 0 && columns <= stored * 32, "columns must be in 0..", stored * 32, ", got ",
        columns);
  const int64_t need = interleave ? columns : (columns * bits + 31) / 32;
  check(need <= stored && (!interleave || need == stored), columns, " columns of ", bits,
        " bits need ", need, " words a row, got ", stored);
  const Tensor in = dense(words);
  Tensor q = empty({rows, columns}, ScalarType::Byte);
  run(UnpackFields{data<uint32_t>(in), mutable_data<uint8_t>(q), rows, columns, stored,
                   static_cast<int>(bits), interleave},
      grain_for(columns * (interleave ? 8 : 1), 1 << 18));
  return q;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fewbit, m) {
  m.def("unpack_fields(Tensor words, int bits, int columns, bool interleave=False) -> Tensor");
}
FEWBIT_CPU_OP(unpack_fields)

}  // namespace fewbit::bindings
