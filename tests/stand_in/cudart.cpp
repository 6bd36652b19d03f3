// CUDA's runtime library for two cards that are not there: their memory is the host's, and kernels
// of fewbit run as plain C++ (kernels.cpp). torch and a fewbit that nvcc compiled run over it as
// they are, so that launches, streams, devices and graphs are tested without a card. As on a card:
//
// - memory of a card is closed to the host: a read or a write outside of copies and kernels ends
//   the process;
// - while a stream records a graph, what waits for the card or allocates is refused, and so is a
//   launch into another stream; what was recorded runs when the graph is launched, not before;
// - a launch beyond the limits of the architecture (FEWBIT_STAND_IN, 75 for a T4), or into a stream
//   of another card, is refused, and a kernel that reads another card's memory, or on from where an
//   allocation ends, ends the process.
//
// torch's own kernels are not served: sitecustomize.py has the CPU do their work.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

constexpr int cards = 2;
constexpr size_t memory = size_t(4) << 30;
constexpr size_t most_parameter = 1024;

using Work = std::function<void()>;
using Graph = std::vector<Work>;

struct Stream {
  int device = 0;
  Graph* recording = nullptr;
};
struct Event {
  std::chrono::steady_clock::time_point at;
};
struct Region {
  size_t bytes;  // up to a page that is never open, so that what lies behind is not read
  int device;
  char* pages;
};

std::recursive_mutex mutex;
std::map<char*, Region> regions;  // of the cards' memory
std::map<void*, size_t> pinned;
std::map<const void*, std::string> kernels;  // by what the host calls them
std::map<const void*, int> more_shared;
std::map<Stream*, int> streams;
Stream of_null[cards] = {{0}, {1}};
thread_local int device_now = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

cudaError_t fail(cudaError_t error) { return last = error; }

int architecture() {
  const char* said = getenv("FEWBIT_STAND_IN");
  return said ? atoi(said) : 75;
}

size_t shared_at_most() {
  switch (architecture()) {
    case 75: return 64 << 10;
    case 80: return 163 << 10;
    case 90: return 227 << 10;
    default: return 99 << 10;
  }
}

Stream& stream_of(cudaStream_t s) {
  return s ? *reinterpret_cast<Stream*>(s) : of_null[device_now];
}

bool recording() {
  for (auto& [s, _] : streams)
    if (s->recording) return true;
  return false;
}

// What may not happen while a graph is recorded, unless the thread has relaxed the rule.
bool refused_now() { return mode != cudaStreamCaptureModeRelaxed && recording(); }

constexpr int every_card = -1;

// The memory of a card is open as long as one of these lives.
class Open {
 public:
  explicit Open(int device) : lock_(mutex), device_(device) { set(PROT_READ | PROT_WRITE); }
  ~Open() { set(PROT_NONE); }

 private:
  void set(int access) const {
    for (auto& [p, r] : regions)
      if (device_ == every_card || r.device == device_)
        mprotect(r.pages, size_t(p + r.bytes - r.pages), access);
  }
  std::lock_guard<std::recursive_mutex> lock_;
  int device_;
};

cudaError_t submit(cudaStream_t stream, int device, Work work) {
  const std::lock_guard lock(mutex);
  Stream& s = stream_of(stream);
  const Work opened = [=] {
    const Open open(device);
    work();
  };
  if (s.recording) {
    s.recording->push_back(opened);
    return cudaSuccess;
  }
  if (refused_now()) return fail(cudaErrorStreamCaptureImplicit);
  opened();
  return cudaSuccess;
}

auto region_of(const void* p) {
  auto it = regions.upper_bound(static_cast<char*>(const_cast<void*>(p)));
  if (it == regions.begin()) return regions.end();
  --it;
  return static_cast<const char*>(p) < it->first + it->second.bytes ? it : regions.end();
}

void* emulated(const char* name) {
  static void* const library = [] {
    const char* path = getenv("FEWBIT_STAND_IN_KERNELS");
    void* found = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!found) {
      fprintf(stderr, "stand-in: FEWBIT_STAND_IN_KERNELS: %s\n", path ? dlerror() : "not set");
      abort();
    }
    return found;
  }();
  return dlsym(library, name);
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                   cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  const auto found = kernels.find(function);
  if (found == kernels.end()) return fail(cudaErrorInvalidDeviceFunction);
  const std::string& name = found->second;
  void* kernel = emulated(name.c_str());
  if (!kernel) {
    fprintf(stderr, "stand-in: no kernel %s\n", name.c_str());
    return fail(cudaErrorInvalidDeviceFunction);
  }
  const unsigned threads = block.x * block.y * block.z;
  const auto asked = more_shared.find(function);
  const size_t allowed = asked == more_shared.end() ? 48 << 10 : size_t(asked->second);
  if (threads == 0 || threads > 1024 || shared > allowed || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    return fail(cudaErrorInvalidValue);
  const int device = stream ? stream_of(stream).device : device_now;
  if (device != device_now) return fail(cudaErrorInvalidResourceHandle);
  std::array<char, most_parameter> parameter;
  memcpy(parameter.data(), arguments[0], most_parameter);
  using Run = void (*)(void*, const unsigned*, const unsigned*, const void*);
  static const Run run = reinterpret_cast<Run>(emulated("run_kernel"));
  return submit(stream, device, [=] {
    const unsigned of_grid[] = {grid.x, grid.y, grid.z}, of_block[] = {block.x, block.y, block.z};
    run(kernel, of_grid, of_block, parameter.data());
  });
}

}  // namespace

extern "C" {

int stand_in_unserved(const char* name) {
  fprintf(stderr, "stand-in: %s is not served\n", name);
  return fail(cudaErrorNotSupported);
}

// ---- cards -------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) { return *count = cards, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = device_now, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cards) return fail(cudaErrorInvalidDevice);
  return device_now = device, cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (device < 0 || device >= cards) return fail(cudaErrorInvalidDevice);
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *value = architecture() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = architecture() % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = 3; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(shared_at_most()); break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device < 0 || device >= cards) return fail(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "stand-in for sm_%d", architecture());
  p->uuid.bytes[0] = char(1 + device);
  p->major = architecture() / 10;
  p->minor = architecture() % 10;
  p->totalGlobalMem = memory;
  p->multiProcessorCount = 3;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsPerMultiProcessor = 1024;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = p->sharedMemPerMultiprocessor = shared_at_most();
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->l2CacheSize = 1 << 20;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -1, cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceSynchronize() {
  return refused_now() ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

// Of the driver's library, what torch asks for by name.
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, 0;
}
int cuCtxGetCurrent(void** context) { return *context = &of_null[device_now], 0; }
static int not_served() { return 801; }  // CUDA_ERROR_NOT_SUPPORTED
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** entry, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *entry = strcmp(symbol, "cuDevicePrimaryCtxGetState") == 0
               ? reinterpret_cast<void*>(&cuDevicePrimaryCtxGetState)
               : reinterpret_cast<void*>(&not_served);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// ---- errors ------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  return last = cudaSuccess, error;
}
cudaError_t cudaPeekAtLastError() { return last; }
const char* cudaGetErrorName(cudaError_t error) {
  static thread_local char name[32];
  return snprintf(name, sizeof name, "cudaError %d", int(error)), name;
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// ---- memory ------------------------------------------------------------------------------------

cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
  const std::lock_guard lock(mutex);
  *left = *total = memory;
  for (auto& [_, r] : regions)
    if (r.device == device_now) *left -= r.bytes;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** p, size_t bytes) {
  const std::lock_guard lock(mutex);
  if (refused_now()) return fail(cudaErrorStreamCaptureUnsupported);
  constexpr size_t line = 256, page = 4096;  // a card's allocations begin on whole lines
  bytes = (std::max<size_t>(bytes, 1) + line - 1) / line * line;
  size_t left, total;
  cudaMemGetInfo(&left, &total);
  if (bytes > left) return fail(cudaErrorMemoryAllocation);
  const size_t whole = (bytes + page - 1) / page * page;
  void* made = mmap(nullptr, whole + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  char* pages = static_cast<char*>(made);
  regions[pages + whole - bytes] = {bytes, device_now, pages};
  return *p = pages + whole - bytes, cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  const std::lock_guard lock(mutex);
  if (!p) return cudaSuccess;
  if (refused_now()) return fail(cudaErrorStreamCaptureUnsupported);
  const auto it = regions.find(static_cast<char*>(p));
  if (it == regions.end()) return fail(cudaErrorInvalidValue);
  const auto& [start, r] = *it;
  munmap(r.pages, size_t(start + r.bytes - r.pages) + 4096);
  regions.erase(it);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  const std::lock_guard lock(mutex);
  *p = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (!*p) return fail(cudaErrorMemoryAllocation);
  pinned[*p] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  const std::lock_guard lock(mutex);
  pinned.erase(p);
  free(p);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  const std::lock_guard lock(mutex);
  memset(a, 0, sizeof *a);
  a->device = device_now;
  a->type = cudaMemoryTypeUnregistered;
  if (const auto it = region_of(p); it != regions.end()) {
    a->type = cudaMemoryTypeDevice;
    a->device = it->second.device;
    a->devicePointer = const_cast<void*>(p);
  }
  for (auto& [start, bytes] : pinned)
    if (p >= start && p < static_cast<char*>(start) + bytes) {
      a->type = cudaMemoryTypeHost;
      a->devicePointer = a->hostPointer = const_cast<void*>(p);
    }
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return submit(stream, every_card, [=] { memmove(to, from, bytes); });
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (refused_now()) return fail(cudaErrorStreamCaptureUnsupported);
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return submit(stream, every_card, [=] { memset(to, value, bytes); });
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}

// ---- streams and events ------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* made, unsigned, int priority) {
  const std::lock_guard lock(mutex);
  auto* s = new Stream{device_now};
  streams[s] = priority;
  return *made = reinterpret_cast<cudaStream_t>(s), cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* made, unsigned flags) {
  return cudaStreamCreateWithPriority(made, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* made) {
  return cudaStreamCreateWithPriority(made, 0, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t s) {
  const std::lock_guard lock(mutex);
  streams.erase(&stream_of(s));
  delete &stream_of(s);
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t s, int* priority) {
  const std::lock_guard lock(mutex);
  return *priority = s ? streams[&stream_of(s)] : 0, cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t) {
  return refused_now() ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return refused_now() ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* made, unsigned) {
  return *made = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* made) { return cudaEventCreateWithFlags(made, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  delete reinterpret_cast<Event*>(e);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t, unsigned) {
  reinterpret_cast<Event*>(e)->at = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  return cudaEventRecordWithFlags(e, s, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t) {
  return refused_now() ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return cudaEventQuery(e); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  const std::chrono::duration<float, std::milli> passed =
      reinterpret_cast<Event*>(end)->at - reinterpret_cast<Event*>(start)->at;
  return *ms = passed.count(), cudaSuccess;
}

// ---- graphs ------------------------------------------------------------------------------------

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  return std::swap(mode, *other), cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
  const std::lock_guard lock(mutex);
  if (!s) return fail(cudaErrorStreamCaptureUnsupported);
  stream_of(s).recording = new Graph;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
  const std::lock_guard lock(mutex);
  *graph = reinterpret_cast<cudaGraph_t>(stream_of(s).recording);
  stream_of(s).recording = nullptr;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  *status = stream_of(s).recording ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  if (id) *id = 1;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(stream_of(s).recording);
  return cudaStreamIsCapturing(s, status);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return *count = reinterpret_cast<Graph*>(graph)->size(), cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph,
                                          unsigned long long) {
  *made = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  for (const Work& work : *reinterpret_cast<Graph*>(graph)) work();
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

// ---- kernels -----------------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  const std::lock_guard lock(mutex);
  kernels[host] = name;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
  const std::lock_guard lock(mutex);
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize || kernels.count(function) == 0 ||
      value < 0 || size_t(value) > shared_at_most())
    return fail(cudaErrorInvalidValue);
  more_shared[function] = value;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t stream) {
  return launch(function, grid, block, arguments, shared, stream);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function)), cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

}  // extern "C"
