// A float32 prefix rounded to bfloat16 once for a whole pass, as autocast rounds a weight.
//
// Every block of queries reads the prefix and would round it again. Only the virtual tokens that some sequence sees are
// read and written.
#pragma once

#if defined(__AVX512BF16__)

#include "../tiles/bfloat16_pairs.h"
#include "prefix_groups.h"
#include "work_items.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// A problem of type `Problem` whose prefix is the copy.
template <class Problem>
class RoundedPrefix {
 public:
  RoundedPrefix(const Problem& p, const Parallel& parallel)
      : problem_(p), key_(bytes(p.prefix_key, p, p.head_dim)), value_(bytes(p.prefix_value, p, p.value_dim)) {
    const ConstView key = copy_in(key_, p, p.head_dim), value = copy_in(value_, p, p.value_dim);
    const PrefixGroups groups(p);
    auto work = [&](const WorkItem& item, char*) {
      const int64_t prefix = item.index / p.num_kv_heads, head = item.index % p.num_kv_heads;
      if (groups.size(prefix) == 0) return;
      const int64_t length = p.sequences[*groups.begin(prefix)].prefix_length;
      if (key_.data() != nullptr) round_tokens(key, p.prefix_key, prefix, head, length, p.head_dim);
      if (value_.data() != nullptr) round_tokens(value, p.prefix_value, prefix, head, length, p.value_dim);
    };
    if (key_.data() != nullptr || value_.data() != nullptr)
      for_each_work_item(parallel, p.num_prefixes * p.num_kv_heads, 0, work);
    if (key_.data() != nullptr) problem_.prefix_key = key;
    if (value_.data() != nullptr) problem_.prefix_value = value;
  }

  const Problem& problem() const { return problem_; }

 private:
  static int64_t elements(int64_t dim) { return padded_elements<Bfloat16Pairs>(dim); }

  // What a copy takes: nothing if the prefix is bfloat16 already.
  static int64_t bytes(const ConstView& from, const AttentionProblem& p, int64_t dim) {
    if (from.dtype == DType::bf16) return 0;
    return p.num_prefixes * p.num_kv_heads * p.prefix_capacity * elements(dim) *
           static_cast<int64_t>(sizeof(Bfloat16Pair));
  }
  static ConstView copy_in(const Buffer& memory, const AttentionProblem& p, int64_t dim) {
    const int64_t row = Bfloat16Pairs::kPack * elements(dim);
    return {memory.data(), DType::bf16, {p.num_kv_heads * p.prefix_capacity * row, p.prefix_capacity * row, row}};
  }
  static void round_tokens(const ConstView& to, const ConstView& from, int64_t prefix, int64_t head, int64_t length,
                           int64_t dim) {
    auto* rows = static_cast<char*>(const_cast<void*>(to.data)) + token_offset(to.stride, {prefix, head, 0}) * 2;
    const HeadKeys keys{&from, prefix, head, 0, {nullptr, length}, dim};
    Bfloat16Pairs::pack_keys(reinterpret_cast<Bfloat16Pair*>(rows), to.stride[2] / Bfloat16Pairs::kPack, keys, 0,
                             static_cast<int>(length));
  }

  Problem problem_;
  const Buffer key_, value_;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA

#endif
