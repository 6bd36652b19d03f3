// The Python module: what is not a torch operator. The only file that includes pybind11.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "fewbit/kernel.h"
#include "fewbit/layout.h"

namespace py = pybind11;

namespace {

void set_isa(const std::string& name) {
  fewbit::Isa isa;
  if (!fewbit::cpu::parse_isa(name.c_str(), &isa))
    throw std::invalid_argument("isa must be scalar, avx2, avx512 or avx512vnni, got \"" + name +
                                "\" [FB100]");
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fewbit's native module: importing it registers the torch operators.";
  m.attr("__version__") = FEWBIT_VERSION;
  m.attr("cuda") = bool(FEWBIT_WITH_CUDA);
  m.attr("panel_rows") = fewbit::panel_rows;
  m.def(
      "isa", [] { return std::string(fewbit::cpu::isa_name(fewbit::cpu::isa())); },
      "The instruction set whose kernels run.");
  m.def("available_isas", &available_isas, "What this CPU and this build can run, worst first.");
  m.def("set_isa", &set_isa, py::arg("name"), "Choose an instruction set of available_isas().");
}
