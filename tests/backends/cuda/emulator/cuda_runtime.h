// A GPU small enough to read: runs the CUDA sources, unchanged, on the CPU.
//
// Every CUDA thread is a fiber; blocks run one after another, and a fiber runs until it waits for others. So every
// index, every shuffle and every barrier is executed as it is written. Of the hardware it shows nothing: neither speed
// nor caches nor registers, nor the memory order that a vote or a shuffle does not promise and __syncwarp does. The
// order in which fibers run can be changed: results that depend on it give away a missing barrier.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))  // one block runs at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t) { return "refused by the emulator"; }

// One multiprocessor: whatever stays on it has several rounds to do.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx;

namespace emulator {

struct Options {
  // Blocks and fibers run from the last to the first, a warp as far as it gets before another one does. Else blocks
  // follow each other and fibers take turns, both from the first to the last.
  bool hasty = false;
};
inline Options options;

// What the lanes of a mask bring to a meeting, and take away from it.
struct Meeting {
  unsigned arrived = 0;
  uint64_t round = 0;
  alignas(16) unsigned char brought[32][32], taken[32][32];
};

void run_block(int threads, const std::function<void()>& body);
void yield();
void progress();
int lane();
Meeting& meeting(unsigned mask);

// Waits for all lanes of the mask; the last one computes what each takes away.
template <class Taken, class Brought, class Compute>
Taken meet(unsigned mask, const Brought& mine, const Compute& compute) {
  static_assert(sizeof(Brought) <= 32 && sizeof(Taken) <= 32 && std::is_trivially_copyable_v<Brought>);
  Meeting& m = meeting(mask);
  std::memcpy(m.brought[lane()], &mine, sizeof(mine));
  m.arrived |= 1u << lane();
  if (m.arrived == mask) {
    Brought brought[32];
    Taken taken[32];
    for (int i = 0; i < 32; ++i) std::memcpy(&brought[i], m.brought[i], sizeof(Brought));
    compute(brought, taken);
    for (int i = 0; i < 32; ++i) std::memcpy(m.taken[i], &taken[i], sizeof(Taken));
    m.arrived = 0;
    ++m.round;
    progress();
  } else {
    for (const uint64_t round = m.round; m.round == round;) yield();
  }
  Taken result;
  std::memcpy(&result, m.taken[lane()], sizeof(result));
  return result;
}

}  // namespace emulator

void __syncthreads();

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::meet<int>(mask, 0, [](const int*, int* taken) { std::memset(taken, 0, 32 * sizeof(int)); });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulator::meet<unsigned>(mask, predicate, [&](const int* brought, unsigned* taken) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1 && brought[i]) votes |= 1u << i;
    for (int i = 0; i < 32; ++i) taken[i] = votes;
  });
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  return emulator::meet<unsigned>(mask, value, [&](const T* brought, unsigned* taken) {
    for (int i = 0; i < 32; ++i) {
      taken[i] = 0;
      for (int k = 0; k < 32; ++k)
        if (mask >> k & 1 && brought[k] == brought[i]) taken[i] |= 1u << k;
    }
  });
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  return emulator::meet<T>(mask, value, [&](const T* brought, T* taken) {
    for (int i = 0; i < 32; ++i) taken[i] = brought[i < distance ? i : i - distance];
  });
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulator::meet<T>(mask, value, [&](const T* brought, T* taken) {
    for (int i = 0; i < 32; ++i) taken[i] = brought[from];
  });
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 || grid.z != 1) return cudaErrorInvalidValue;
  if (block.x == 0 || block.x > 1024) return cudaErrorInvalidValue;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = emulator::options.hasty ? dim3(grid.x - 1 - x, grid.y - 1 - y, 0) : dim3(x, y, 0);
      emulator::run_block(static_cast<int>(block.x), [&] { kernel(arguments...); });
    }
  return cudaSuccess;
}
