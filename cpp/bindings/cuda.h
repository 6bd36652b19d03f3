// Bindings of ops that have a CUDA kernel: where a call runs, and registration for CUDA tensors.
//
// A CUDA kernel runs on cards on which it has been verified (python/fewbit/cuda.py hands over the
// table); on any other card its op calls its plain twin in reference.py.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "common.h"

#if FEWBIT_WITH_CUDA
#include "fewbit/cuda.h"
#endif

namespace fewbit::bindings {

// Whether `op` is verified on the architecture (75, 80, ..) or unverified kernels are wanted.
bool verified(const char* op, int architecture);

#if FEWBIT_WITH_CUDA

// The architecture whose kernels serve t: of its card, or the emulated one; 0 for CPU kernels.
inline int architecture_of(const Tensor& t) {
  return t.is_cuda() ? cuda::architecture(t.get_device_index()) : cuda::emulated();
}

void* current_stream(int device);  // torch's; null (the default stream) while emulating

template <class Args>
void run_cuda(const Tensor& on, const Args& args, const char* op) {
  const char* error = nullptr;
  if (on.is_cuda()) {
    const int device = on.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    error = cuda::launch(args, {cuda::architecture(device), device, current_stream(device)});
  } else {
    error = cuda::launch(args, {cuda::emulated(), 0, nullptr});
  }
  if (error == nullptr) return;
  std::ostringstream message;
  message << op << ": the CUDA kernel for shape " << shape_of(on) << " was not launched: " << error;
  throw std::runtime_error(message.str());
}

#endif

// The kernel of `args` where `on` lives.
template <class Args>
void run_on([[maybe_unused]] const Tensor& on, const Args& args, [[maybe_unused]] const char* op,
            int64_t grain) {
#if FEWBIT_WITH_CUDA
  if (architecture_of(on) != 0) return run_cuda(on, args, op);
#endif
  run(args, grain);
}

// Beside `like`, on its device.
inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(
      like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), type);
}

inline void check_beside(const Tensor& on, const Tensor& t, const char* name) {
  check(on.device() == t.device(), name, " must be on the device of the first argument");
}

// What runs for an op that has a CUDA kernel: `native`, or the twin.
using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

template <Boxed native, class Name>
void native_or_plain(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
#if FEWBIT_WITH_CUDA
  const auto first = torch::stable::detail::to<AtenTensorHandle>(stack[0]);  // still the stack's
  int32_t type = 0, device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(first, &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(first, &device));
  const bool real = type == aoti_torch_device_type_cuda();
  const int architecture = real ? cuda::architecture(device) : cuda::emulated();
  if ((real || architecture != 0) && !verified(Name::op, architecture)) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(Name::plain, "", stack, TORCH_ABI_VERSION));
    return;
  }
#endif
  native(stack, inputs, outputs);
}

}  // namespace fewbit::bindings

// Registers the binding `name` for the op of that name on CPU and CUDA tensors.
#define FEWBIT_OP(name)                                               \
  struct name##_name {                                                \
    static constexpr const char* op = #name;                          \
    static constexpr const char* plain = "fewbit_plain::" #name;      \
  };                                                                  \
  STABLE_TORCH_LIBRARY_IMPL(fewbit, CPU, m) {                         \
    m.impl(#name, (&native_or_plain<TORCH_BOX(&name), name##_name>)); \
  }                                                                   \
  FEWBIT_CUDA_OP(name)

#if FEWBIT_WITH_CUDA
#define FEWBIT_CUDA_OP(name)                                          \
  STABLE_TORCH_LIBRARY_IMPL(fewbit, CUDA, m) {                        \
    m.impl(#name, (&native_or_plain<TORCH_BOX(&name), name##_name>)); \
  }
#else
#define FEWBIT_CUDA_OP(name)
#endif
