#include "emulate.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <mutex>
#include <utility>
#include <vector>

#include "fewbit/cuda.h"

namespace fewbit::cuda {

namespace emulator {

dim3 thread_index, block_index, block_size, grid_size;
unsigned char* shared = nullptr;

namespace {

constexpr size_t stack_bytes = 64 * 1024;
constexpr int most_threads = 1024;

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  jmp_buf state;
  ucontext_t start;
  bool started, done;
  unsigned slot;                          // which half of the exchange buffer is next
  std::vector<std::vector<Copy>> copies;  // groups of cp.async, the last one open
};

Fiber fibers[most_threads];
Barrier block, warps[most_threads / 32];
alignas(16) unsigned char slots[most_threads / 32][2][32 * 64];
unsigned char* stacks = nullptr;
const std::function<void()>* body = nullptr;
jmp_buf scheduler;
int current = 0, live = 0;
long progress = 0;
int architecture_now = 0;
bool descending_now = false;
int64_t launches_now = 0;
bool refuses_now = false;
Runner& runner_now = *new Runner;  // never destroyed: it may hold what Python has long freed

void select(int i) {
  current = i;
  thread_index = dim3(unsigned(i) % block_size.x, unsigned(i) / block_size.x);
}

// setjmp and longjmp switch stacks without the system calls of swapcontext.
[[gnu::noinline]] void yield() {
  const int me = current;
  if (_setjmp(fibers[me].state) == 0) _longjmp(scheduler, 1);
}

void entry() {
  (*body)();
  fibers[current].done = true;
  --live;
  ++progress;
  _longjmp(scheduler, 1);
}

[[gnu::noinline]] void resume(int i) {
  if (_setjmp(scheduler) != 0) return;
  select(i);
  Fiber& f = fibers[i];
  if (f.started) _longjmp(f.state, 1);
  f.started = true;
  setcontext(&f.start);
}

void arrive(Barrier& b, int members) {
  const unsigned generation = b.generation;
  ++progress;
  if (++b.arrived == members) {
    b.arrived = 0;
    ++b.generation;
    return;
  }
  while (b.generation == generation) yield();
}

void run_block(int threads) {
  for (size_t i = 0; i < shared_bytes; ++i) shared[i] = 0xFF;
  block = Barrier();
  for (Barrier& w : warps) w = Barrier();
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.started = f.done = false;
    f.slot = 0;
    f.copies.assign(1, {});
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = stacks + size_t(i) * stack_bytes;
    f.start.uc_stack.ss_size = stack_bytes;
    f.start.uc_link = nullptr;
    makecontext(&f.start, entry, 0);
  }
  live = threads;
  while (live > 0) {
    const long before = progress;
    for (int i = 0; i < threads; ++i) {
      const int at = descending_now ? threads - 1 - i : i;
      if (!fibers[at].done) resume(at);
    }
    if (progress == before) {
      fprintf(stderr, "CUDA emulator: a barrier that not every thread of the block reaches\n");
      abort();
    }
  }
}

}  // namespace

void block_barrier() { arrive(block, live); }

void warp_barrier() {
  const int first = current / 32 * 32;
  if (first + 32 > int(block_size.x * block_size.y)) {
    fprintf(stderr, "CUDA emulator: a warp-wide operation in a warp that is not full\n");
    abort();
  }
  arrive(warps[current / 32], 32);
}

void copy_later(void* to, const void* from) { fibers[current].copies.back().push_back({to, from}); }

void end_copies() { fibers[current].copies.emplace_back(); }

void wait_for_copies(size_t open) {
  auto& groups = fibers[current].copies;
  while (groups.size() > open + 1) {
    for (const Copy& c : groups.front()) {
      if (c.from)
        __builtin_memcpy(c.to, c.from, 16);
      else
        __builtin_memset(c.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

unsigned char* exchange() {
  Fiber& f = fibers[current];
  f.slot ^= 1;
  return slots[current / 32][f.slot];
}

void run(const std::function<void()>& kernel, dim3 grid, dim3 block_dim) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  ++launches_now;
  const int threads = int(block_dim.x * block_dim.y);
  if (threads > most_threads) {
    fprintf(stderr, "CUDA emulator: a block of %d threads\n", threads);
    abort();
  }
  static std::vector<unsigned char> stack_memory(size_t(most_threads) * stack_bytes);
  alignas(128) static unsigned char shared_memory[shared_bytes];
  stacks = stack_memory.data();
  shared = shared_memory;
  body = &kernel;
  block_size = block_dim;
  grid_size = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = dim3(x, y, z);
        run_block(threads);
      }
}

bool taken(const void* kernel, dim3 grid, dim3 block, size_t shared, const void* args,
           size_t bytes) {
  if (!runner_now) return false;
  Dl_info symbol{};
  dladdr(kernel, &symbol);
  ++launches_now;
  runner_now({symbol.dli_sname ? symbol.dli_sname : "a kernel without a name",
              {grid.x, grid.y, grid.z},
              {block.x, block.y, block.z},
              shared,
              std::string(static_cast<const char*>(args), bytes)});
  return true;
}

}  // namespace emulator

void run_launches_by(Runner runner) { emulator::runner_now = std::move(runner); }

void emulate(int architecture, bool descending) {
  emulator::architecture_now = architecture;
  emulator::descending_now = descending;
}
int emulated() { return emulator::architecture_now; }
bool emulated_descending() { return emulator::descending_now; }
int64_t emulated_launches() { return emulator::launches_now; }
void refuse_launches(bool refuse) { emulator::refuses_now = refuse; }
bool refuses_launches() { return emulator::refuses_now; }
int architecture(int) { return emulator::architecture_now; }
int processors(int) { return 3; }
int64_t shared_memory(int) {
  return emulator::architecture_now == 75 ? 64 * 1024 : int64_t(emulator::shared_bytes);
}

}  // namespace fewbit::cuda
