// Merges attention over one set of keys with attention of the same queries over another, in place into the first.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../types.h"

namespace prefixcore::cuda {

struct LseMerge {
  int64_t batch = 0, heads = 0, queries = 0, value_dim = 0;
  void* out = nullptr;  // [B, H, T, Dv], any strides
  DType dtype = DType::f32;
  int64_t out_stride[4] = {};
  float* lse = nullptr;  // [B, H, T], any strides; +inf and -inf both say that the row sees nothing
  int64_t lse_stride[3] = {};
  const void* other_out = nullptr;  // in the dtype of out, or float32
  DType other_dtype = DType::f32;
  int64_t other_out_stride[4] = {};
  const float* other_lse = nullptr;
  int64_t other_lse_stride[3] = {};
};

// A row that neither sees has out 0 and lse -inf afterwards.
cudaError_t lse_merge(const LseMerge&, cudaStream_t);

}  // namespace prefixcore::cuda
