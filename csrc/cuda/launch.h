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

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace prefixcore::cuda
