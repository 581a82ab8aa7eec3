// Host facts for Python: which instruction set is in use, what was compiled in. Apart from the op
// library, because pybind11 modules are bound to one Python version and that library is not.
//
// The facts live in the op library (one copy of the dispatch state); this module asks it.
#include "host.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <thread>
#include <vector>

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about this build of prefixcore and the machine it runs on.";
  m.def("isa", [] { return std::string(prefixcore_isa()); }, "The instruction set in use.");
  m.def(
      "select_isa",
      [](const std::string& name) {
        if (const char* problem = prefixcore_select_isa(name.c_str())) throw py::value_error(problem);
      },
      py::arg("name"), "Switches the kernels to another instruction set that this machine can run.");
  m.def(
      "runnable_isas",
      [] {
        const char* names[8];
        const int count = prefixcore_runnable_isas(names, 8);
        return std::vector<std::string>(names, names + count);
      },
      "Instruction sets that were compiled in and that this machine can run, best first.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = PREFIXCORE_COMPILER;
        info["torch"] = PREFIXCORE_TORCH;
        info["compiled_isas"] = PREFIXCORE_ISAS;
        info["cuda_architectures"] = PREFIXCORE_CUDA_ARCHITECTURES;
        return info;
      },
      "What was compiled in, by which compiler, against which torch.");
  m.def("hardware_threads", [] { return std::thread::hardware_concurrency(); }, "Hardware threads of this machine.");
}
