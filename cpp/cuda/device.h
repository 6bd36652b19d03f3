// What every kernel file uses: launching, vector access, reductions in a fixed order.
#pragma once
#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "emulate.h"
#endif

#include <type_traits>

#include "fewbit/cuda.h"
#include "fewbit/numeric.h"

#define FEWBIT_DEVICE __device__ __forceinline__

namespace fewbit::cuda {

constexpr int warp_size = 32;
constexpr unsigned full_warp = 0xFFFFFFFFu;

#if defined(__CUDACC__)
template <class Args>
const char* start(void (*kernel)(Args), dim3 grid, dim3 block, size_t shared, Place place,
                  Args args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  const void* function = reinterpret_cast<const void*>(kernel);
  // This copy of the runtime library has a current device of its own, beside torch's.
  cudaError_t error = cudaSetDevice(place.device);
  // From 48 KiB on it is to be asked for, and static variables, 2 KiB at most beside it, count.
  if (error == cudaSuccess && shared > 46 * 1024)
    error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  void* list[] = {&args};
  if (error == cudaSuccess)
    error = cudaLaunchKernel(function, grid, block, list, shared,
                             static_cast<cudaStream_t>(place.stream));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // leave nothing behind for the caller's next call
  return cudaGetErrorString(error);
}

FEWBIT_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char fewbit_dynamic_shared[];
  return fewbit_dynamic_shared;
}
#else
template <class Args>
const char* start(void (*kernel)(Args), dim3 grid, dim3 block, size_t shared, Place, Args args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  if (refuses_launches()) return "refused by the emulator";
  if (int64_t(shared) > shared_memory(0)) return "too much shared memory";
  if (grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) return "too many blocks";
  const void* function = reinterpret_cast<const void*>(kernel);
  if (!emulator::taken(function, grid, block, shared, &args, sizeof args))
    emulator::run([&] { kernel(args); }, grid, block);
  return nullptr;
}

inline unsigned char* dynamic_shared() { return emulator::shared; }
#endif

// Calls f(T*) for the element type that `type` names.
template <class F>
auto with_type(DType type, const F& f) {
  if (type == DType::f32) return f(static_cast<float*>(nullptr));
  if (type == DType::f16) return f(static_cast<Half*>(nullptr));
  return f(static_cast<BFloat16*>(nullptr));
}
template <class P>
using element = std::remove_pointer_t<P>;

// V neighbours as one access; p must be aligned to all of them.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T v[V];
};
// Elements of the longest access.
template <class T>
constexpr int in_access = 16 / int(sizeof(T));
// The type of one access of so many bytes.
template <int bytes>
struct Whole;
template <>
struct Whole<1> {
  using type = uint8_t;
};
template <>
struct Whole<2> {
  using type = uint16_t;
};
template <>
struct Whole<4> {
  using type = uint32_t;
};
template <>
struct Whole<8> {
  using type = uint2;
};
template <>
struct Whole<16> {
  using type = uint4;
};

template <int V, class T>
FEWBIT_DEVICE Vector<T, V> load(const T* p) {
  using Access = typename Whole<int(sizeof(T)) * V>::type;
  return __builtin_bit_cast(Vector<T, V>, *reinterpret_cast<const Access*>(p));
}
// V elements at p, in accesses of `access` elements.
template <int access, class T, int V>
FEWBIT_DEVICE void load_floats(const T* p, float (&v)[V]) {
#pragma unroll
  for (int i = 0; i < V; i += access) {
    const Vector<T, access> in = load<access>(p + i);
#pragma unroll
    for (int j = 0; j < access; ++j) v[i + j] = to_float(in.v[j]);
  }
}

// To global memory. Long stores are said as one instruction: the compiler would store every element
// as soon as it is there, where there is inline PTX in between.
template <class T, int V>
FEWBIT_DEVICE void store(T* p, const Vector<T, V>& v) {
  using Access = typename Whole<int(sizeof(T)) * V>::type;
  const Access whole = __builtin_bit_cast(Access, v);
#if defined(__CUDA_ARCH__)
  const size_t to = __cvta_generic_to_global(p);
  if constexpr (sizeof(Access) == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(whole.x), "r"(whole.y),
                 "r"(whole.z), "r"(whole.w)
                 : "memory");
    return;
  } else if constexpr (sizeof(Access) == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(whole.x), "r"(whole.y)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Access*>(p) = whole;
}

// Whether accesses of 16 bytes may begin at p; null is no reason against them.
__host__ FEWBIT_DEVICE bool at_16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Elements of one 16-byte access where every row and group starts on one; else 1.
template <class T>
bool wide(int64_t columns, int64_t group_size, const void* p) {
  constexpr int n = in_access<T>;
  return columns % n == 0 && group_size % n == 0 && at_16(p);
}

struct Sum {
  FEWBIT_DEVICE float operator()(float a, float b) const { return a + b; }
};
// These pass over a NaN.
struct Least {
  FEWBIT_DEVICE float operator()(float a, float b) const { return fminf(a, b); }
};
struct Most {
  FEWBIT_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Over `lanes` neighbours of a warp, a power of two; every lane gets the same bits.
template <class F>
FEWBIT_DEVICE float reduce_lanes(float v, int lanes, F f) {
#pragma unroll
  for (int d = warp_size / 2; d > 0; d /= 2)
    if (d < lanes) v = f(v, __shfl_xor_sync(full_warp, v, d));
  return v;
}

// Each of n numbers over the block; every thread gets the same bits. blockDim.x is a power of two
// of whole warps. of_warp is shared memory.
template <int n, class F>
FEWBIT_DEVICE void reduce_block(float (&v)[n], F f, float (*of_warp)[warp_size]) {
  const int warps = int(blockDim.x) / warp_size, lane = int(threadIdx.x) % warp_size;
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] = reduce_lanes(v[i], warp_size, f);
  __syncthreads();  // what the reduction before has left there has been read
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (lane == 0) of_warp[i][int(threadIdx.x) / warp_size] = v[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] = reduce_lanes(of_warp[i][lane & (warps - 1)], warps, f);
}
template <int n, class F>
FEWBIT_DEVICE void reduce_block(float (&v)[n], F f) {
  __shared__ float of_warp[n][warp_size];
  reduce_block(v, f, of_warp);
}
template <class F>
FEWBIT_DEVICE float reduce_block(float v, F f) {
  float one[1] = {v};
  reduce_block(one, f);
  return one[0];
}

inline unsigned threads_for(int64_t work, unsigned most = 256) {
  unsigned n = warp_size;
  while (n < most && int64_t(n) < work) n *= 2;
  return n;
}

}  // namespace fewbit::cuda
