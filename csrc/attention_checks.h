// What prefix attention expects of its tensors, beyond the values in them: those are checked where they are read.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>

#include "checks.h"

namespace prefixcore {

// Lengths are counted in 32 bits here and there.
constexpr int64_t kMost = INT32_MAX;

// Scale and softcap become float32 numbers, and so does their quotient: within these sizes nothing is lost, and
// products of a hundred million overflow nothing. `prefixcore/backends/checks.py` says the same in the same words.
constexpr double kSmallest = 1e-30, kLargest = 1e30;

[[noreturn]] inline void refuse_number(const char* name, const char* expected, double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", x);
  refuse(name, expected, text);
}

inline void check_factor(const char* name, double x) {
  if (x != 0 && !(std::abs(x) >= kSmallest && std::abs(x) <= kLargest))
    refuse_number(name, "0, or a size from 1e-30 to 1e+30", x);
}

inline void check_factors(double scale, double softcap) {
  check_factor("scale", scale);
  if (softcap == 0) return;
  if (!(softcap >= kSmallest && softcap <= kLargest))
    refuse_number("softcap", "none, or a number from 1e-30 to 1e+30", softcap);
  check_factor("scale / softcap", scale / softcap);
}

inline void check_window(int64_t sliding_window) {
  if (sliding_window < 0) refuse("sliding_window", "none, or at least 1", std::to_string(sliding_window));
}

// The sizes of a call, named as in `docs/`: those of the bank are 1 and P where there is a prefix and no bank.
struct AttentionSizes {
  int64_t batch, heads, queries, dim;  // B, H, T, D
  int64_t kv_heads, keys, value_dim;   // Hkv, S, Dv
  int64_t bank, capacity;              // N, P
  int64_t sequences;                   // B, or how many are packed
};

inline void check_bank(const Tensor& prefix_key, const Tensor& prefix_value, AttentionSizes& n) {
  if (prefix_key.dim() == 4) {
    const int64_t* sizes = check_shape(prefix_key, "prefix_key", {{"N"}, {"Hkv", n.kv_heads}, {"P"}, {"D", n.dim}});
    n.bank = sizes[0];
    n.capacity = sizes[2];
    check_shape(prefix_value, "prefix_value",
                {{"N", n.bank}, {"Hkv", n.kv_heads}, {"P", n.capacity}, {"Dv", n.value_dim}});
    if (n.bank < 1) refuse("prefix_key", "a bank of at least one entry", text_of(prefix_key.sizes()));
  } else {
    n.bank = 1;
    n.capacity = check_shape(prefix_key, "prefix_key", {{"Hkv", n.kv_heads}, {"P"}, {"D", n.dim}})[1];
    check_shape(prefix_value, "prefix_value", {{"Hkv", n.kv_heads}, {"P", n.capacity}, {"Dv", n.value_dim}});
  }
}

inline void check_countable(const AttentionSizes& n) {
  const Size sizes[] = {{"B", n.batch}, {"H", n.heads}, {"T", n.queries},
                        {"S", n.keys},  {"N", n.bank},  {"P", n.capacity}};
  for (const Size& size : sizes)
    if (size.size > kMost) refuse(size.letter, "at most 2^31 - 1", std::to_string(size.size));
}

inline void check_vector(const OptionalTensor& t, const char* name, Size length) {
  if (!t) return;
  check_shape(*t, name, {length});
  check_integer(*t, name);
}

inline AttentionSizes check_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                      const Tensor& prefix_key, const Tensor& prefix_value,
                                      const OptionalTensor& prefix_index, const OptionalTensor& prefix_lengths,
                                      const OptionalTensor& padding, const OptionalTensor& mask,
                                      const OptionalTensor& sinks, const OptionalTensor& cu_seqlens, double scale,
                                      int64_t sliding_window, double softcap) {
  AttentionSizes n;
  const int64_t* q = check_shape(query, "query", {{"B"}, {"H"}, {"T"}, {"D"}});
  n.batch = q[0], n.heads = q[1], n.queries = q[2], n.dim = q[3];
  const int64_t* k = check_shape(key, "key", {{"B", n.batch}, {"Hkv"}, {"S"}, {"D", n.dim}});
  n.kv_heads = k[1], n.keys = k[2];
  n.value_dim = check_shape(value, "value", {{"B", n.batch}, {"Hkv", n.kv_heads}, {"S", n.keys}, {"Dv"}})[3];
  if (n.dim < 1) refuse("query", "a head dim of at least 1", text_of(query.sizes()));
  if (n.kv_heads < 1 || n.heads % n.kv_heads != 0)
    refuse("key", "a number of heads that divides query's " + std::to_string(n.heads), std::to_string(n.kv_heads));
  check_bank(prefix_key, prefix_value, n);
  check_countable(n);

  const DType dtype = dtype_of(query, "query"), prefix_dtype = dtype_of(prefix_key, "prefix_key");
  check_same_dtype(key, "key", query, "query");
  check_same_dtype(value, "value", query, "query");
  if (prefix_dtype != dtype && prefix_dtype != DType::f32)
    refuse("prefix_key", "the dtype of query, or float32", "another one");
  check_same_dtype(prefix_value, "prefix_value", prefix_key, "prefix_key");

  n.sequences = n.batch;
  if (cu_seqlens) {
    check_vector(cu_seqlens, "cu_seqlens", {"sequences + 1"});
    n.sequences = cu_seqlens->numel() - 1;
    if (n.batch != 1 || n.keys != n.queries || n.sequences < 1)
      refuse("cu_seqlens", "a batch of 1, as many keys as queries, and two numbers at least",
             text_of(cu_seqlens->sizes()) + ", query " + text_of(query.sizes()) + " and key " + text_of(key.sizes()));
  }
  check_vector(prefix_index, "prefix_index", {"sequences", n.sequences});
  check_vector(prefix_lengths, "prefix_lengths", {"N", n.bank});
  if (padding) {
    check_shape(*padding, "padding", {{"B", n.batch}, {"S", n.keys}});
    if (type_of(*padding) != aoti_torch_dtype_bool()) refuse("padding", "bool", "another dtype");
  }
  if (mask) {
    check_shape(*mask, "mask", {{"B", n.batch}, {"H", n.heads}, {"T", n.queries}, {"S", n.keys}});
    if (type_of(*mask) != aoti_torch_dtype_bool()) dtype_of(*mask, "mask");
  }
  if (sinks) {
    check_shape(*sinks, "sinks", {{"H", n.heads}});
    check_floating(*sinks, "sinks");
  }
  check_factors(scale, softcap);
  check_window(sliding_window);
  return n;
}

// What the backward is given of the forward, and what comes in from behind.
inline void check_outputs(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out, const Tensor& lse,
                          const Tensor& query, const AttentionSizes& n) {
  const std::initializer_list<Size> rows = {{"B", n.batch}, {"H", n.heads}, {"T", n.queries}, {"Dv", n.value_dim}};
  check_shape(grad_out, "grad_out", rows);
  check_shape(out, "out", rows);
  check_same_dtype(grad_out, "grad_out", query, "query");
  check_same_dtype(out, "out", query, "query");
  const std::initializer_list<Size> numbers = {{"B", n.batch}, {"H", n.heads}, {"T", n.queries}};
  check_shape(lse, "lse", numbers);
  if (dtype_of(lse, "lse") != DType::f32) refuse("lse", "float32", "another dtype");
  if (!grad_lse) return;
  check_shape(*grad_lse, "grad_lse", numbers);
  check_floating(*grad_lse, "grad_lse");
}

}  // namespace prefixcore
