// Registering an op: its native kernel for the CPU and, on cards where that is verified, for CUDA;
// for whatever else its plain twin in reference.py, behind the checks of the native one.
#pragma once
#include <array>
#include <vector>

#include "common.h"

#if FEWBIT_WITH_CUDA
#include "fewbit/cuda.h"
#endif

namespace fewbit::bindings {

// Whether `op` is verified on the architecture (75, 80, ..) or unverified kernels are wanted. The
// table is of python/fewbit/cuda.py.
bool verified(const char* op, int architecture);

// Raises what torch's last call has ended with: its interface gives a code alone. `otherwise`: what
// is said where torch does not know, before 2.13.
[[noreturn]] void raise_torchs_error(const char* op, const char* otherwise);
// Whether that is all that `error` says.
bool is_code(const std::runtime_error& error);

struct Device {
  int32_t type, index;
};
std::string name_of(Device device);

// ---- the plain twin ----------------------------------------------------------------------------

template <class Result>
struct Results {  // of one tensor
  static Tensor from(const StableIValue* stack) {
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
};
template <>
struct Results<void> {
  static void from(const StableIValue*) {}
};
template <class... T>
struct Results<std::tuple<T...>> {
  static std::tuple<T...> from(const StableIValue* stack) {
    return from(stack, std::index_sequence_for<T...>());
  }
  template <size_t... i>
  static std::tuple<T...> from(const StableIValue* stack, std::index_sequence<i...>) {
    return {torch::stable::detail::to<T>(stack[i])...};
  }
};

// Another operator by its name.
template <class Result, class... Arguments>
Result call(const char* name, const Arguments&... arguments) {
  end_of_checks();
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  if (torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS)
    raise_torchs_error(name, "failed; torch has printed why");
  return Results<Result>::from(stack.data());
}

// ---- where a call runs -------------------------------------------------------------------------

// The device of the tensors met so far: another one is an error, and so is a tensor without memory
// of its own (sparse).
class OneDevice {
 public:
  explicit OneDevice(const char* op) : op_(op) {}
  void meet(const Tensor& t) {
    int32_t layout = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
    check(layout == aoti_torch_layout_strided(), op_, ": tensors must be dense, got a sparse one");
    Device here;  // torch::stable's own knows few types
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &here.type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &here.index));
    if (!first_) first_ = here;
    check(first_->type == here.type && first_->index == here.index, op_,
          ": tensors must lie on one device, got ", name_of(*first_), " and ", name_of(here));
  }
  void meet(const std::optional<Tensor>& t) {
    if (t) meet(*t);
  }
  void meet(const std::vector<Tensor>& list) {
    for (const Tensor& t : list) meet(t);
  }
  template <class Other>
  void meet(const Other&) {}

 private:
  const char* op_;
  std::optional<Device> first_;
};

// torch dispatches to on_cpu where all tensors lie there.
template <auto function, class Name>
struct Op;
template <class R, class... A, R (*function)(A...), class Name>
struct Op<function, Name> {
  static R on_cpu(A... a) {
#if FEWBIT_CUDA_EMULATED
    if (Name::on_cards && cuda::emulated() != 0 && !verified(Name::op, cuda::emulated()))
      return plain(a...);
#endif
    return native(std::forward<A>(a)...);
  }

  static R on_card(A... a) {
#if FEWBIT_WITH_CUDA
    meet(a...);
    if (verified(Name::op, cuda::architecture(std::get<0>(std::tie(a...)).get_device_index())))
      return native(std::forward<A>(a)...);
#endif
    return plain(a...);
  }

  static R elsewhere(A... a) {
    meet(a...);
    return plain(a...);
  }

 private:
  static R native(A... a) {
    try {
      return function(std::forward<A>(a)...);
    } catch (const std::runtime_error& error) {
      if (is_code(error)) raise_torchs_error(Name::op, error.what());
      throw;
    }
  }

  static void meet(const A&... a) {
    OneDevice device(Name::op);
    (device.meet(a), ...);
  }

  static R plain(const A&... a) {
    try {
      const OnlyChecks only;
      function(a...);
    } catch (const Checked&) {
    } catch (const std::runtime_error& error) {
      if (!is_code(error)) throw;  // memory that torch does not show: the twin may do without
    }
    return call<R>(Name::plain, a...);
  }
};

}  // namespace fewbit::bindings

#define FEWBIT_OP_WHERE(name, cards)                                                          \
  struct name##_name {                                                                        \
    static constexpr const char* op = #name;                                                  \
    static constexpr const char* plain = "fewbit_plain::" #name;                              \
    static constexpr bool on_cards = cards;                                                   \
  };                                                                                          \
  using name##_op = Op<&name, name##_name>;                                                   \
  STABLE_TORCH_LIBRARY_IMPL(fewbit, CPU, m) { m.impl(#name, TORCH_BOX(&name##_op::on_cpu)); } \
  STABLE_TORCH_LIBRARY_IMPL(fewbit, CompositeExplicitAutograd, m) {                           \
    m.impl(#name, TORCH_BOX(&name##_op::elsewhere));                                          \
  }

// Registers the binding `name` for the op of that name: FEWBIT_CPU_OP for one without a CUDA
// kernel.
#define FEWBIT_CPU_OP(name) FEWBIT_OP_WHERE(name, false)
#if FEWBIT_WITH_CUDA
#define FEWBIT_OP(name)       \
  FEWBIT_OP_WHERE(name, true) \
  STABLE_TORCH_LIBRARY_IMPL(fewbit, CUDA, m) { m.impl(#name, TORCH_BOX(&name##_op::on_card)); }
#else
#define FEWBIT_OP(name) FEWBIT_OP_WHERE(name, false)
#endif
