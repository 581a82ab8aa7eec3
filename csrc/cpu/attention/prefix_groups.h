// Which sequences name which entry of the prefix bank.
#pragma once

#include "../tiles/arena.h"
#include "problem.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// The entry that a sequence really sees, or -1.
inline int64_t prefix_of(const Sequence& s) { return s.prefix >= 0 && s.prefix_length > 0 ? s.prefix : -1; }

// Sequences sorted by entry (those without a prefix first), each group in its own order.
class PrefixGroups {
 public:
  explicit PrefixGroups(const AttentionProblem& p)
      : memory_((p.num_sequences + p.num_prefixes + 3) * static_cast<int64_t>(sizeof(int64_t))),
        num_prefixes_(p.num_prefixes) {
    order_ = reinterpret_cast<int64_t*>(memory_.data());
    end_ = order_ + p.num_sequences;
    for (int64_t e = -1; e <= num_prefixes_; ++e) end_[e + 1] = 0;
    for (int64_t i = 0; i < p.num_sequences; ++i) ++end_[prefix_of(p.sequences[i]) + 2];
    for (int64_t e = 0; e <= num_prefixes_; ++e) end_[e + 1] += end_[e];
    // end_[e + 1] is now where group e begins, and becomes where it ends.
    for (int64_t i = 0; i < p.num_sequences; ++i) order_[end_[prefix_of(p.sequences[i]) + 1]++] = i;
  }

  const int64_t* begin(int64_t prefix) const { return order_ + (prefix >= 0 ? end_[prefix] : 0); }
  const int64_t* end(int64_t prefix) const { return order_ + end_[prefix + 1]; }
  int64_t size(int64_t prefix) const { return end(prefix) - begin(prefix); }
  int64_t num_prefixes() const { return num_prefixes_; }

 private:
  Buffer memory_;
  int64_t num_prefixes_;
  int64_t *order_, *end_;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
