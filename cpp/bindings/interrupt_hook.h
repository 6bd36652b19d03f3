// How an operator asks the host language whether the user wants to stop; knows no torch.
#pragma once

namespace fewbit::bindings {

// True when an exception waits to be raised once the operator has returned, so that nobody sees its
// unfinished result. Called on the thread that called the operator. Null until module.cpp sets it.
using InterruptHook = bool (*)();
void set_interrupt_hook(InterruptHook hook);
InterruptHook interrupt_hook();

}  // namespace fewbit::bindings
