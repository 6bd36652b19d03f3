// CUDA's vocabulary in plain C++: a kernel runs block after block, one fiber per thread.
//
// A fiber runs until it meets a barrier or a warp-wide operation, so races show only as results
// that depend on the order of the fibers (ascending or descending, cuda::emulate). A barrier that
// not every thread reaches ends the process with a message. Only full warps may shuffle.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace fewbit::cuda::emulator {

extern dim3 thread_index, block_index, block_size, grid_size;
constexpr size_t shared_bytes = 227 * 1024;
extern unsigned char* shared;  // filled with NaN before every block

void run(const std::function<void()>& kernel, dim3 grid, dim3 block);
// Whether a runner (fewbit/cuda.h) has taken the launch instead.
bool taken(const void* kernel, dim3 grid, dim3 block, size_t shared, const void* args,
           size_t bytes);
void block_barrier();
void warp_barrier();
// Two slots of 32 x 64 bytes: lanes leave values in one while the other may still be read.
unsigned char* exchange();

// cp.async: a copy is made when the thread waits for it, not before; null copies zeros.
void copy_later(void* to, const void* from);
void end_copies();
void wait_for_copies(size_t open);

// What `value` is in the lane that `from` names, once all lanes have arrived.
template <class T>
T shuffle(T value, unsigned from) {
  T* slots = reinterpret_cast<T*>(exchange());
  slots[thread_index.x % 32] = value;
  warp_barrier();
  return slots[from];
}

// Values of all 32 lanes, once they have arrived.
template <class T>
const T* gather(const T& value) {
  static_assert(sizeof(T) <= 64);
  T* slots = reinterpret_cast<T*>(exchange());
  slots[thread_index.x % 32] = value;
  warp_barrier();
  return slots;
}

}  // namespace fewbit::cuda::emulator

#define threadIdx fewbit::cuda::emulator::thread_index
#define blockIdx fewbit::cuda::emulator::block_index
#define blockDim fewbit::cuda::emulator::block_size
#define gridDim fewbit::cuda::emulator::grid_size

inline void __syncthreads() { fewbit::cuda::emulator::block_barrier(); }
inline void __syncwarp() { fewbit::cuda::emulator::warp_barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
  return fewbit::cuda::emulator::shuffle(value, threadIdx.x % 32 ^ unsigned(mask));
}
template <class T>
T __shfl_sync(unsigned, T value, int lane, int = 32) {
  return fewbit::cuda::emulator::shuffle(value, unsigned(lane));
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t both = uint64_t(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += int8_t(a >> 8 * i) * int8_t(b >> 8 * i);
  return sum;
}
