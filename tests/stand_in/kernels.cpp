// Our kernels as plain C++ (cpp/cuda/emulate.h), behind one call that the runtime library makes.
#include "../../cpp/cuda/emulate.h"

namespace {

// At least as large as any kernel's parameter, which lies at the start of what is passed: a class
// of more than 16 bytes is copied onto the stack, whatever its size.
struct Parameter {
  unsigned char bytes[1024];
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void run_kernel(void* kernel,
                                                                  const unsigned* grid,
                                                                  const unsigned* block,
                                                                  const void* argument) {
  const Parameter& p = *static_cast<const Parameter*>(argument);
  fewbit::cuda::emulator::run([&] { reinterpret_cast<void (*)(Parameter)>(kernel)(p); },
                              dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]));
}
