// Sums partial results that several blocks left side by side, in the order of the splits: the same bits on every run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace prefixcore::cuda {

struct SplitReduction {
  const float* partials = nullptr;  // [splits, count], stride between the splits
  int64_t splits = 0, count = 0, stride = 0;
  float scale = 1.0f;
  float* out = nullptr;  // [count], scale times the sum
};

cudaError_t split_reduction(const SplitReduction&, cudaStream_t);

}  // namespace prefixcore::cuda
