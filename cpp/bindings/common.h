// What every binding needs: tensors, checks that say what is wrong, and running a kernel.
//
// Bindings do every check once and fill the args struct; kernels trust it. Torch is reached through
// its stable ABI only (libtorch 2.10 and up, one binary for all of them).
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "fewbit/dtype.h"
#include "fewbit/kernel.h"

namespace fewbit::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A ValueError in Python (module.cpp).
[[noreturn]] void raise_value_error(const std::ostringstream& message);
[[noreturn]] void raise_keyboard_interrupt();

// Raises ValueError in Python: one sentence with the offending value and what is allowed, and the
// id of errors.py's UsageError.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts) << " [FB100]";
  raise_value_error(message);
}

// While one lives, a binding ends where its checks do: what would read or write data, or have a
// kernel do so, throws Checked. An op's plain twin runs after them, be the tensors where they may.
struct Checked {};
class OnlyChecks {
 public:
  OnlyChecks() { wanted = true; }
  ~OnlyChecks() { wanted = false; }
  OnlyChecks(const OnlyChecks&) = delete;
  OnlyChecks& operator=(const OnlyChecks&) = delete;
  static inline thread_local bool wanted = false;
};
inline void end_of_checks() {
  if (OnlyChecks::wanted) throw Checked();
}

bool in_forked_child();  // threads of the parent do not exist here (threads.cpp)

// Runs the kernel of `args` over all its tasks, on torch's threads. `grain` tasks at least go to a
// thread. Kernels neither throw nor depend on how tasks are cut.
template <class Args>
void run(const Args& args, int64_t grain = 1) {
  end_of_checks();
  const Kernel<Args> kernel = cpu::kernel_for<Args>();
  const int64_t tasks = args.tasks();
  if (tasks <= grain || in_forked_child()) {
    kernel(args, 0, tasks);
    return;
  }
  torch::stable::parallel_for(0, tasks, grain,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// So that one task range is at least about this many elements of work.
inline int64_t grain_for(int64_t elements_per_task, int64_t least = 32768) {
  return elements_per_task >= least ? 1 : (least + elements_per_task) / (elements_per_task + 1);
}

inline DType dtype_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return DType::f32;
  if (type == ScalarType::Half) return DType::f16;
  if (type == ScalarType::BFloat16) return DType::bf16;
  check(false, name, " must be float32, float16 or bfloat16, got ",
        torch::headeronly::toString(type));
  return DType::f32;
}

inline ScalarType scalar_type(DType t) {
  return t == DType::f16    ? ScalarType::Half
         : t == DType::bf16 ? ScalarType::BFloat16
                            : ScalarType::Float;
}

inline DType dtype_named(const std::string& text, const char* name) {
  if (text == "float32") return DType::f32;
  if (text == "float16") return DType::f16;
  if (text == "bfloat16") return DType::bf16;
  check(false, name, " must be float32, float16 or bfloat16, got \"", text, "\"");
  return DType::f32;
}

inline void check_dtype(const Tensor& t, ScalarType type, const char* name) {
  check(t.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", got ",
        torch::headeronly::toString(t.scalar_type()));
}

// Written as text only by a check that fails: every call of an operator passes several.
struct ShapeOf {
  const Tensor& t;
};
inline ShapeOf shape_of(const Tensor& t) { return {t}; }
inline std::ostream& operator<<(std::ostream& text, ShapeOf shape) {
  text << "[";
  for (int64_t i = 0; i < shape.t.dim(); ++i) text << (i ? ", " : "") << shape.t.size(i);
  return text << "]";
}

inline void check_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t n : shape) same = same && t.size(i++) == n;
  if (same) return;
  std::ostringstream want;
  i = 0;
  for (int64_t n : shape) want << (i++ ? ", " : "") << n;
  check(false, name, " must have shape [", want.str(), "], got ", shape_of(t));
}

// Numbers that only say how long a call takes: more of them change nothing, and 2^63 never end.
inline void check_repeats(int64_t n, const char* name) {
  constexpr int64_t most = 1000;
  check(n >= 0 && n <= most, name, " must be in 0..", most, ", got ", n);
}

inline void check_matrix(const Tensor& t, const char* name, const char* dims) {
  check(t.dim() == 2, name, " must be ", dims, ", got shape ", shape_of(t));
}

// -1 is the whole row; anything larger than the row is the row.
inline int64_t resolve_group(int64_t group_size, int64_t columns) {
  check(group_size == -1 || group_size >= 1,
        "group_size must be -1 (whole row) or at least 1, got ", group_size);
  const int64_t row = columns > 0 ? columns : 1;
  return group_size == -1 || group_size > row ? row : group_size;
}

inline int64_t count_groups(int64_t columns, int64_t group_size) {
  return (columns + group_size - 1) / group_size;
}

// From an existing tensor, because torch::stable::empty looks its operator up by name, which costs
// more than the allocation. Obeys torch's deterministic fill, as torch.empty does.
inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
  static const Tensor& any =
      *new Tensor(torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef()));
  return torch::stable::new_empty(
      any, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), type);
}

// The ScalarType of float or double.
template <class Real>
constexpr ScalarType real_type = sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float;

// Whether an operand that sets the type of the sums is float64; float32 is the other choice.
inline bool is_double(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, name,
        " must be float32 or float64, got ", torch::headeronly::toString(type));
  return type == ScalarType::Double;
}

// Arrays for one call, side by side, each on a cache line of its own: Scratch<float, int> s(n, m);
// then s.get<0>() holds n floats. In one tensor, or where they are small in the object itself, as
// an allocation by torch is 1 to 2 of the 3 to 6 us of a small call; NaN before they are written.
template <class... T>
class Scratch {
 public:
  template <class... N>
  explicit Scratch(N... counts)
      : at_{0, ((int64_t(counts) * int64_t(sizeof(T)) + 63) / 64 * 64)...}, base_(near_) {
    static_assert(sizeof...(N) == sizeof...(T), "one count per array");
    const int64_t bytes = end_of_all();
    if (bytes <= int64_t(sizeof near_)) {
      std::memset(near_, 0xFF, size_t(bytes));
      return;
    }
    memory_ = empty({bytes}, ScalarType::Byte);
    base_ = static_cast<char*>(memory_->mutable_data_ptr());
  }
  Scratch(const Scratch&) = delete;  // base_ may point into the object
  Scratch& operator=(const Scratch&) = delete;
  template <size_t i>
  auto* get() const {
    using Element = std::tuple_element_t<i, std::tuple<T...>>;
    return reinterpret_cast<Element*>(base_ + at_[i]);
  }

 private:
  int64_t end_of_all() {
    for (size_t i = 1; i <= sizeof...(T); ++i) at_[i] += at_[i - 1];
    return at_[sizeof...(T)];
  }

  int64_t at_[sizeof...(T) + 1];
  alignas(64) char near_[8192];
  std::optional<Tensor> memory_;
  char* base_;
};

// Row-major, copied only if it is not.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Row-major float32, copied only if it is not.
inline Tensor as_float(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? dense(t)
                                              : dense(torch::stable::to(t, ScalarType::Float));
}

// Whether a result should be written past the caches, being larger than they are: needs whole lines
// in its rows and groups.
inline bool past_caches(const Tensor& out, int64_t row_bytes, int64_t group_bytes) {
  constexpr int64_t line = 64, large = 16 << 20;
  const int64_t last_group = row_bytes % group_bytes;
  return out.numel() * out.element_size() >= large && group_bytes % line == 0 &&
         last_group % line == 0 && reinterpret_cast<uintptr_t>(out.const_data_ptr()) % line == 0;
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace fewbit::bindings
