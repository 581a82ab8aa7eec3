// Attention of a few queries a row over the prefix that the row names in a bank: the prefix's part of a decoding step.
//
// One block reads one stretch of one prefix's keys once for all batch rows that name the prefix (as many as fit into
// its 64 rows of scores), found by scanning the indices on the device. Splits over the keys leave partial results,
// which a second kernel merges in their order. Nothing is asked of the GPU by the host, no atomics: the same bits on
// every run on the same kind of GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../types.h"

namespace prefixcore::cuda {

struct BankDecode {
  ConstView query;  // [B, H, T, D] bfloat16 or float16; these three aligned to sixteen bytes in every row
  ConstView key;    // [N, Hkv, P, D]
  ConstView value;  // [N, Hkv, P, Dv]
  const int64_t* prefix_index = nullptr;    // [B], -1: none; nullptr: 0 for all
  const int64_t* prefix_lengths = nullptr;  // [N]; nullptr: P for all
  int64_t batch = 0, heads = 0, kv_heads = 0, queries = 0, head_dim = 0, value_dim = 0;
  int64_t bank = 0, capacity = 0;
  float scale = 1.0f;
  float* partial_out = nullptr;  // [splits, B, H, T, Dv], written where a split sees keys
  float* partial_lse = nullptr;  // [splits, B, H, T]
  float* out = nullptr;          // [B, H, T, Dv]; 0 where a row names no prefix or an empty one
  float* lse = nullptr;          // [B, H, T]; -inf there. An index or a length out of range: NaN in both
  int64_t splits = 1, split_keys = 0;
};

// Chooses how the keys are split: enough blocks for all multiprocessors, whole tiles of keys each.
cudaError_t plan(BankDecode&);

cudaError_t bank_decode(const BankDecode&, cudaStream_t);

}  // namespace prefixcore::cuda
