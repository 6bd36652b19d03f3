// Ctrl-C inside a long operator: work is cut into pieces, and between two of them the thread that
// called the operator asks whether the user wants to stop.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "common.h"
#include "interrupt_hook.h"

namespace fewbit::bindings {

// One per call of an operator, made on the calling thread.
class Interrupt {
 public:
  bool stopped() {
    if (stopped_.load(std::memory_order_relaxed)) return true;
    if (std::this_thread::get_id() != caller_) return false;
    const auto now = std::chrono::steady_clock::now();
    if (now - asked_ < std::chrono::milliseconds(50)) return false;
    asked_ = now;
    const InterruptHook hook = interrupt_hook();
    if (hook != nullptr && hook()) stopped_.store(true, std::memory_order_relaxed);
    return stopped_.load(std::memory_order_relaxed);
  }

 private:
  std::atomic<bool> stopped_{false};
  std::thread::id caller_ = std::this_thread::get_id();
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
};

// As run(), in pieces of `grain` tasks, until `interrupt` says stop.
template <class Args>
void run(const Args& args, int64_t grain, Interrupt& interrupt) {
  end_of_checks();
  const Kernel<Args> kernel = cpu::kernel_for<Args>();
  const int64_t tasks = args.tasks();
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && !interrupt.stopped(); i += grain)
      kernel(args, i, std::min(i + grain, end));
  };
  if (tasks <= grain || in_forked_child())
    range(0, tasks);
  else
    torch::stable::parallel_for(0, tasks, grain, range);
}

// Rows that a second-order solver takes at a time, a task for each thread: its scratch is as large
// as they are. Rows are independent, so their number changes no bit.
template <class Args>
int64_t rows_per_pass(int64_t rows) {
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  return std::min(rows, Args::panel * Args::task_panels * std::max<int64_t>(threads, 1));
}

}  // namespace fewbit::bindings
