#include "driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

// In libtorch_cuda, on which this library must not depend (see csrc/cuda/binding.cpp).
using CurrentStream = int32_t (*)(int32_t device, void** stream);

namespace prefixcore::launch {
namespace {

using Result = int;  // CUresult; 0 is success

template <class Function>
void look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
}

struct Driver {
  Result (*launch_kernel)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                          void* stream, void** parameters, void** extra);
  Result (*get_error_string)(Result, const char**);
  Result (*get_context)(void**);
  Result (*set_context)(void*);
  Result (*get_device)(int* device, int ordinal);
  Result (*retain_context)(void**, int device);
  CurrentStream stand_in_stream;

  Driver() {
    const char* stand_in = std::getenv("PREFIXCORE_STAND_IN_DRIVER");  // of the tests; nothing else sets it
    const char* name = stand_in != nullptr ? stand_in : "libcuda.so.1";
    void* library = dlopen(name, RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr)
      throw std::runtime_error(std::string("prefixcore: expected NVIDIA's driver, got ") + dlerror());
    look_up(library, "cuLaunchKernel", launch_kernel);
    look_up(library, "cuGetErrorString", get_error_string);
    look_up(library, "cuCtxGetCurrent", get_context);
    look_up(library, "cuCtxSetCurrent", set_context);
    look_up(library, "cuDeviceGet", get_device);
    look_up(library, "cuDevicePrimaryCtxRetain", retain_context);
    look_up(library, "prefixcore_stand_in_stream", stand_in_stream);
    if (launch_kernel == nullptr || get_context == nullptr || set_context == nullptr || get_device == nullptr ||
        retain_context == nullptr)
      throw std::runtime_error(std::string("prefixcore: expected NVIDIA's driver in ") + name +
                               ", got another library");
  }

  void check(Result result) const {
    if (result == 0) return;
    const char* words = nullptr;
    if (get_error_string != nullptr) get_error_string(result, &words);
    throw std::runtime_error("prefixcore: CUDA error " + std::to_string(result) + ": " +
                             (words != nullptr ? words : "unknown"));
  }
};

const Driver& driver() {
  static const Driver one;
  return one;
}

CurrentStream find_current_stream() {
  CurrentStream function = nullptr;
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library != nullptr) look_up(library, "aoti_torch_get_current_cuda_stream", function);
  if (function == nullptr)
    throw std::runtime_error("prefixcore: expected a PyTorch with CUDA, but libtorch_cuda.so is not loaded");
  return function;
}

// A thread that has done nothing on a GPU yet has no context; the device's primary one is PyTorch's.
void need_context(const Driver& d, int32_t ordinal) {
  void* context = nullptr;
  d.check(d.get_context(&context));
  if (context != nullptr) return;
  int device = 0;
  d.check(d.get_device(&device, ordinal));
  d.check(d.retain_context(&context, device));
  d.check(d.set_context(context));
}

}  // namespace

Target target_for(bool cuda, int32_t device) {
  Target target{cuda, device, nullptr};
  const Driver& d = driver();
  CurrentStream current = d.stand_in_stream;
  if (cuda) {
    need_context(d, device);
    static const CurrentStream of_torch = find_current_stream();
    current = of_torch;
  } else if (current == nullptr) {
    throw std::runtime_error("prefixcore: expected CUDA tensors");
  }
  if (current(device, &target.stream) != 0) throw std::runtime_error("prefixcore: PyTorch has no current stream");
  return target;
}

namespace {

uint64_t word_of(const Parameter& p, const Operands& operands) {
  switch (p.kind) {
    case Parameter::Kind::address: return reinterpret_cast<uint64_t>(operands.addresses[p.value]) + p.bits;
    case Parameter::Kind::size: return static_cast<uint64_t>(operands.sizes[p.value][p.bits]);
    case Parameter::Kind::stride: return static_cast<uint64_t>(operands.strides[p.value][p.bits]);
    default: return p.bits;
  }
}

}  // namespace

void run_kernel(const Kernel& kernel, const Operands& operands, const Target& target) {
  constexpr size_t kMost = 128;
  uint64_t words[kMost];
  void* pointers[kMost];
  const size_t count = kernel.parameters.size();
  if (count > kMost) throw std::runtime_error("prefixcore: expected a kernel of at most 128 parameters");
  for (size_t n = 0; n < count; ++n) {
    words[n] = word_of(kernel.parameters[n], operands);
    pointers[n] = &words[n];
  }
  const Driver& d = driver();
  d.check(d.launch_kernel(kernel.function, kernel.grid, 1, 1, kernel.threads, 1, 1, kernel.shared, target.stream,
                          pointers, nullptr));
}

}  // namespace prefixcore::launch
