// A forked child has none of its parent's worker threads: waiting for them would hang for ever.
#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fewbit::bindings {

namespace {

std::atomic<bool> forked{false};

#if defined(__unix__) || defined(__APPLE__)
const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
#endif

}  // namespace

bool in_forked_child() { return forked.load(std::memory_order_relaxed); }

}  // namespace fewbit::bindings
