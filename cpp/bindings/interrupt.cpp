#include <atomic>

#include "interrupt_hook.h"

namespace fewbit::bindings {

namespace {

std::atomic<InterruptHook> registered{nullptr};

}  // namespace

void set_interrupt_hook(InterruptHook hook) { registered.store(hook); }

InterruptHook interrupt_hook() { return registered.load(std::memory_order_relaxed); }

}  // namespace fewbit::bindings
