// The Python module: what is not a torch operator. The only file that includes pybind11.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "fewbit/kernel.h"
#include "fewbit/layout.h"
#include "interrupt_hook.h"

#if FEWBIT_WITH_CUDA
#include "fewbit/cuda.h"
#endif

namespace py = pybind11;

namespace fewbit::bindings {

void set_verified(const std::string& op, int architecture);  // op.cpp
void allow_unverified(bool on);

// As pybind11's exception, which every torch passes on as it is: 2.15 makes a RuntimeError of
// std::invalid_argument.
[[noreturn]] void raise_value_error(const std::ostringstream& message) {
  throw py::value_error(message.str());
}

namespace {

class KeyboardInterrupt : public py::builtin_exception {
 public:
  KeyboardInterrupt() : builtin_exception("") {}
  void set_error() const override { PyErr_SetNone(PyExc_KeyboardInterrupt); }
};

}  // namespace

[[noreturn]] void raise_keyboard_interrupt() { throw KeyboardInterrupt(); }

}  // namespace fewbit::bindings

namespace {

void set_isa(const std::string& name) {
  fewbit::Isa isa;
  if (!fewbit::cpu::parse_isa(name.c_str(), &isa))
    throw std::invalid_argument(
        "isa must be scalar, avx2, avx512, avx512vnni or avx512amx, got \"" + name + "\" [FB100]");
  if (isa > fewbit::cpu::best_isa())
    throw std::invalid_argument("isa " + name + " is not available: this machine and build have " +
                                fewbit::cpu::isa_name(fewbit::cpu::best_isa()) +
                                " at best [FB100]");
  fewbit::cpu::set_isa(isa);
}

py::list available_isas() {
  py::list names;
  for (int i = 0; i <= static_cast<int>(fewbit::cpu::best_isa()); ++i)
    names.append(fewbit::cpu::isa_name(static_cast<fewbit::Isa>(i)));
  return names;
}

// What a signal handler has raised inside an operator, until control is back in Python.
PyObject* raised[3] = {nullptr, nullptr, nullptr};

int raise_kept(void*) {
  PyErr_Restore(raised[0], raised[1], raised[2]);
  return -1;
}

// Runs the handlers of pending signals (on the main thread; elsewhere there are none). The operator
// then returns early, and the pending call raises before its caller sees the result.
bool interrupted() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return false;
  PyErr_Fetch(&raised[0], &raised[1], &raised[2]);
  return Py_AddPendingCall(&raise_kept, nullptr) == 0;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fewbit's native module: importing it registers the torch operators.";
  m.attr("__version__") = FEWBIT_VERSION;
  m.attr("cuda") = bool(FEWBIT_WITH_CUDA) && !FEWBIT_CUDA_EMULATED;
  fewbit::bindings::set_interrupt_hook(&interrupted);
  m.attr("panel_rows") = fewbit::panel_rows;
  m.def(
      "isa", [] { return std::string(fewbit::cpu::isa_name(fewbit::cpu::isa())); },
      "The instruction set whose kernels run.");
  m.def("available_isas", &available_isas, "What this CPU and this build can run, worst first.");
  m.def("set_verified", &fewbit::bindings::set_verified, py::arg("op"), py::arg("architecture"),
        "Let the CUDA kernel of `op` run on cards of compute capability `architecture` (75, ..).");
  m.def("allow_unverified", &fewbit::bindings::allow_unverified, py::arg("on"),
        "Let every CUDA kernel run on every card.");
#if FEWBIT_CUDA_EMULATED
  m.def("emulate_cuda", &fewbit::cuda::emulate, py::arg("architecture"),
        py::arg("descending") = false,
        "Run CPU tensors through the CUDA kernels, one thread after the other; 0 ends it.");
  m.def(
      "emulated_cuda",
      [] { return py::make_tuple(fewbit::cuda::emulated(), fewbit::cuda::emulated_descending()); },
      "The arguments of emulate_cuda that hold now.");
  m.def("refuse_cuda_launches", &fewbit::cuda::refuse_launches, py::arg("refuse"),
        "Let the launches that follow fail, as a card's driver may.");
  m.def(
      "run_launches_by",
      [](const std::function<void(const std::string&, const std::array<unsigned, 3>&,
                                  const std::array<unsigned, 3>&, size_t, const py::bytes&)>& run) {
        if (!run) return fewbit::cuda::run_launches_by({});
        fewbit::cuda::run_launches_by([run](const fewbit::cuda::Launch& l) {
          const py::gil_scoped_acquire gil;
          run(l.kernel, l.grid, l.block, l.shared, py::bytes(l.args));
        });
      },
      py::arg("run"),
      "Hand the emulator's launches over (kernel, grid, block, shared, args); None ends it.");
  m.def("emulated_launches", &fewbit::cuda::emulated_launches, "Kernels emulated so far.");
#endif
  m.def("set_isa", &set_isa, py::arg("name"), "Choose an instruction set of available_isas().");
}
