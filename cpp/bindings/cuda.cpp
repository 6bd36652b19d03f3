#include "cuda.h"

#include <atomic>
#include <mutex>
#include <set>
#include <utility>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace fewbit::bindings {

namespace {

std::mutex mutex;
std::set<std::pair<std::string, int>> table;
std::atomic<bool> everything{false};

}  // namespace

void set_verified(const std::string& op, int architecture) {
  const std::lock_guard<std::mutex> lock(mutex);
  table.emplace(op, architecture);
}

void allow_unverified(bool on) { everything.store(on); }

bool verified(const char* op, int architecture) {
  if (everything.load(std::memory_order_relaxed)) return true;
  const std::lock_guard<std::mutex> lock(mutex);
  return table.count({op, architecture}) > 0;
}

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
