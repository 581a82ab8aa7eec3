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

// What a kernel's parameters are made of: the addresses of the plan's values, and its arguments' sizes and strides.
struct Operands {
  char* const* addresses = nullptr;
  const int64_t* const* sizes = nullptr;
  const int64_t* const* strides = nullptr;
};

// Runs `kernel`. std::runtime_error with the driver's words if it fails.
void run_kernel(const Kernel& kernel, const Operands& operands, const Target& target);

}  // namespace prefixcore::launch
