#include "device.h"

namespace fewbit::cuda {

#if defined(__CUDACC__)

namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

}  // namespace

int architecture(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

int processors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

int64_t shared_memory(int device) {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

void emulate(int, bool) {}
int emulated() { return 0; }
bool emulated_descending() { return false; }
int64_t emulated_launches() { return 0; }
void refuse_launches(bool) {}
bool refuses_launches() { return false; }
void run_launches_by(Runner) {}

#endif

}  // namespace fewbit::cuda
