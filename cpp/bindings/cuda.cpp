#include "cuda.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace fewbit::bindings {

#if FEWBIT_WITH_CUDA

// libtorch_cuda is not linked: this module also loads beside a torch without it.
void* current_stream(int device) {
#if defined(__linux__)
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  void* stream = nullptr;
  if (get != nullptr && get(device, &stream) == AOTI_TORCH_SUCCESS) return stream;
#endif
  throw std::runtime_error(
      "torch's current CUDA stream cannot be found: torch is built without CUDA [FB600]");
}

#endif

}  // namespace fewbit::bindings
