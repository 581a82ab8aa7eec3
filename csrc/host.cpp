// Host facts for Python: which instruction set is in use, what was compiled in. Apart from the op
// library, because pybind11 modules are bound to one Python version and that library is not.
//
// The facts live in the op library (one copy of the dispatch state); this module asks it.
#include "host.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
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
  m.def("plan_wanted", prefixcore_plan_wanted,
        "The ticket of the last call on this thread whose signature was unknown, once; 0 if it was known.");
  m.def(
      "plan_keep",
      [](const py::int_& ticket, const py::bytes& words, bool any_length) {
        const std::string_view bytes = words;
        std::vector<int64_t> copy(bytes.size() / sizeof(int64_t));
        std::memcpy(copy.data(), bytes.data(), copy.size() * sizeof(int64_t));
        const char* problem = nullptr;
        const int64_t number =
            prefixcore_plan_keep(ticket.cast<int64_t>(), copy.data(), static_cast<int64_t>(copy.size()),
                                 static_cast<int32_t>(any_length), &problem);
        if (problem != nullptr) throw py::value_error(problem);
        return number;
      },
      py::arg("ticket"), py::arg("words"), py::arg("any_length") = false,
      "Keeps a plan, in 64-bit words, for the call of a ticket or for any length; returns its number.");
  m.def(
      "length_bucket", [](const py::int_& keys) { return prefixcore_length_bucket(keys.cast<int64_t>()); },
      py::arg("keys"), "The number of keys for which a plan of any length is made.");
  m.def(
      "plan_failure", [] { return std::string(prefixcore_plan_failure()); },
      "Why the last replay on this thread failed, once; empty if it did not.");
  m.def(
      "plans",
      [] {
        std::vector<prefixcore_kept_plan> plans(static_cast<size_t>(prefixcore_plans(nullptr, 0)));
        const auto count = prefixcore_plans(plans.data(), static_cast<int64_t>(plans.size()));
        plans.resize(std::min(plans.size(), static_cast<size_t>(count)));
        std::vector<std::tuple<int64_t, int64_t, bool>> out;
        for (const auto& plan : plans) out.emplace_back(plan.number, plan.hits, plan.has_plan != 0);
        return out;
      },
      "`(number, hits, has_plan)` of each signature that is known, the last used first.");
  m.def("plans_limit", prefixcore_plans_limit, "How many signatures are known at most.");
  m.def(
      "plans_set_limit", [](const py::int_& limit) { prefixcore_plans_set_limit(limit.cast<int64_t>()); },
      py::arg("limit"), "Sets that number.");
  m.def("plans_forget", prefixcore_plans_forget, "Forgets all plans.");
  m.def("hardware_threads", [] { return std::thread::hardware_concurrency(); }, "Hardware threads of this machine.");
}
