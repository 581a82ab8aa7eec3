// Prefix attention on the CPU: what the kernels are given and what they must fill.
//
// One softmax runs over the prefix (seen by every query) and the sequence. The kernels never see torch: the binding
// turns tensors into the views below and lends its thread pool. A new option of the op begins here, as a field of
// AttentionProblem.
#pragma once

#include <cstdint>

#include "../../types.h"
#include "../parallel.h"

namespace prefixcore::cpu {

// A batch row, or a packed sequence: where its queries and keys lie in the tensors.
struct Sequence {
  int64_t batch;  // index into the outermost dimension of query, key, value, masks
  int64_t query_start, query_length;
  int64_t key_start, key_length;
  int64_t prefix;         // entry of the prefix bank, or -1: none
  int64_t prefix_length;  // virtual tokens of that entry that count, <= prefix capacity P
};

// A mask over the sequence keys (never over the prefix), already broadcast: strides may be 0.
struct Mask {
  enum class Kind : int32_t { none, boolean, additive };
  Kind kind = Kind::none;
  DType dtype = DType::f32;          // of an additive mask
  const void* data = nullptr;        // boolean: one byte an element, nonzero = visible
  int64_t stride[4] = {0, 0, 0, 0};  // [B, H, T, S]
};

struct AttentionProblem {
  const Sequence* sequences = nullptr;
  int64_t num_sequences = 0;
  int64_t num_heads = 0, num_kv_heads = 0;  // num_heads % num_kv_heads == 0
  int64_t head_dim = 0, value_dim = 0;
  int64_t num_prefixes = 0;     // N, entries of the prefix bank
  int64_t prefix_capacity = 0;  // P

  ConstView query;         // [B, H, T, D]     strides of the first three dimensions
  ConstView key;           // [B, Hkv, S, D]
  ConstView value;         // [B, Hkv, S, Dv]
  ConstView prefix_key;    // [N, Hkv, P, D]
  ConstView prefix_value;  // [N, Hkv, P, Dv]

  const uint8_t* padding = nullptr;  // [B, S], nonzero = visible; null: nothing is padded
  int64_t padding_stride[2] = {0, 0};
  Mask mask;
  const float* sinks = nullptr;  // [H]: one more logit a head in the softmax's denominator

  float scale = 1.0f;
  float softcap = 0.0f;        // > 0: scores become softcap * tanh(scale * q.k / softcap)
  int64_t sliding_window = 0;  // > 0: query i sees keys j > i - window (counted from the end)
  bool causal = true;          // aligned bottom-right: the last query sees the last key
};

struct AttentionForwardProblem : AttentionProblem {
  View out;                        // [B, H, T, Dv], dtype of query
  float* lse = nullptr;            // natural log of the denominator; -inf where a query sees nothing
  int64_t lse_stride[2] = {0, 0};  // [B, H, T], contiguous along T
};

struct AttentionBackwardProblem : AttentionProblem {
  ConstView out, grad_out;          // [B, H, T, Dv]
  const float* lse = nullptr;       // [B, H, T]
  const float* grad_lse = nullptr;  // [B, H, T] with the strides of lse; null: no gradient came
  int64_t lse_stride[2] = {0, 0};

  // Each gradient is wanted if and only if its data pointer is set (grad_key and grad_value
  // together, the two prefix gradients together). All of them are written whole: nothing has to
  // be zeroed before. Tokens outside every sequence do not exist (cu_seqlens covers all of T).
  View grad_query;                     // [B, H, T, D], dtype of query
  View grad_key, grad_value;           // [B, Hkv, S, D], dtype of key
  float* grad_prefix_key = nullptr;    // [N, Hkv, P, D] contiguous, summed over batch and group
  float* grad_prefix_value = nullptr;  // [N, Hkv, P, Dv]
};

// Each instruction set compiles one such table from the same source.
struct AttentionKernels {
  void (*forward)(const AttentionForwardProblem&, const Parallel&);
  void (*backward)(const AttentionBackwardProblem&, const Parallel&);
};

}  // namespace prefixcore::cpu
