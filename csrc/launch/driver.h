// The few functions of NVIDIA's driver that a launch needs. They are looked up when the first kernel is launched: this
// library also loads where there is no driver.
#pragma once

#include <cstdint>

#include "plan.h"

namespace prefixcore::launch {

// Where kernels run: a device, and the stream that is PyTorch's current one on it.
struct Target {
  bool cuda = false;
  int32_t device = 0;
  void* stream = nullptr;
};

// The target for tensors on such a device. CPU tensors have one in tests alone, where a stand-in takes the driver's
// place.
Target target_for(bool cuda, int32_t device);

// Runs `kernel`; `addresses` are those of the plan's values. std::runtime_error with the driver's words if it fails.
void run_kernel(const Kernel& kernel, char* const* addresses, const Target& target);

}  // namespace prefixcore::launch
