// Running the CUDA kernel of an op, on the card and the stream that torch is at.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "op.h"

namespace fewbit::bindings {

#if FEWBIT_WITH_CUDA

// The architecture whose kernels serve t: of its card, or the emulated one; 0 for CPU kernels.
inline int architecture_of(const Tensor& t) {
  return t.is_cuda() ? cuda::architecture(t.get_device_index()) : cuda::emulated();
}

void* current_stream(int device);  // torch's; null (the default stream) while emulating

template <class Args>
void run_cuda(const Tensor& on, const Args& args, const char* op) {
  end_of_checks();
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

}  // namespace fewbit::bindings
