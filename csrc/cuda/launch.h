// Launches a kernel without the <<< >>> that only nvcc understands.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace prefixcore::cuda {

template <class Problem>
cudaError_t launch(void (*kernel)(Problem), const Problem& problem, dim3 grid, int threads, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, problem);
}

// Of the current device.
inline cudaError_t count_multiprocessors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device) : error;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace prefixcore::cuda
