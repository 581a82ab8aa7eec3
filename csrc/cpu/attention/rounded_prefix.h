// A float32 prefix rounded to bfloat16 once for a whole pass, as autocast rounds a weight.
//
// Every block of queries reads the prefix, so rounding it there would be done again and again. Only the virtual
// tokens that some sequence sees are read and written.
#pragma once

#if defined(__AVX512BF16__)

#include "../tiles/bfloat16_pairs.h"
#include "prefix_groups.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// A problem of type `Problem` whose prefix is the copy.
template <class Problem>
class RoundedPrefix {
 public:
  RoundedPrefix(const Problem& p, const Parallel& parallel)
      : problem_(p), key_(bytes(p.prefix_key, p, p.head_dim)), value_(bytes(p.prefix_value, p, p.value_dim)) {
    const ConstView key = copy_in(key_, p, p.head_dim), value = copy_in(value_, p, p.value_dim);
    const PrefixGroups groups(p);
    auto work = [&](const Turn& turn, char*) {
      const int64_t prefix = turn.unit / p.num_kv_heads, head = turn.unit % p.num_kv_heads;
      if (groups.size(prefix) == 0) return;
      const int64_t length = p.sequences[*groups.begin(prefix)].prefix_length;
      if (key_.data() != nullptr) round_rows(key, p.prefix_key, prefix, head, length, p.head_dim);
      if (value_.data() != nullptr) round_rows(value, p.prefix_value, prefix, head, length, p.value_dim);
    };
    if (key_.data() != nullptr || value_.data() != nullptr)
      for_each_unit(parallel, p.num_prefixes * p.num_kv_heads, 0, work);
    if (key_.data() != nullptr) problem_.prefix_key = key;
    if (value_.data() != nullptr) problem_.prefix_value = value;
  }

  const Problem& problem() const { return problem_; }

 private:
  static int64_t steps_of(int64_t count) { return steps<Bfloat16Pairs>(count); }

  // What a copy takes: nothing if the prefix is bfloat16 already.
  static int64_t bytes(const ConstView& from, const AttentionProblem& p, int64_t count) {
    if (from.dtype == DType::bf16) return 0;
    return p.num_prefixes * p.num_kv_heads * p.prefix_capacity * steps_of(count) *
           static_cast<int64_t>(sizeof(Bfloat16Pair));
  }
  static ConstView copy_in(const Buffer& memory, const AttentionProblem& p, int64_t count) {
    const int64_t row = Bfloat16Pairs::kPack * steps_of(count);
    return {memory.data(), DType::bf16, {p.num_kv_heads * p.prefix_capacity * row, p.prefix_capacity * row, row}};
  }
  static void round_rows(const ConstView& to, const ConstView& from, int64_t prefix, int64_t head, int64_t length,
                         int64_t count) {
    auto* rows = static_cast<char*>(const_cast<void*>(to.data)) + row_offset(to.stride, {prefix, head, 0}) * 2;
    const KeyList all{nullptr, length};
    Bfloat16Pairs::pack_rows(reinterpret_cast<Bfloat16Pair*>(rows), to.stride[2] / Bfloat16Pairs::kPack, from, prefix,
                             head, 0, all, 0, static_cast<int>(length), count);
  }

  Problem problem_;
  const Buffer key_, value_;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA

#endif
