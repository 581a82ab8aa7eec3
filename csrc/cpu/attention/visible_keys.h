// Which keys of a sequence exist at all, and which of them a span of queries sees.
#pragma once

#include "../tiles/arena.h"
#include "../tiles/head_keys.h"
#include "problem.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// Keys by their number in a KeyList.
struct KeyRange {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// The keys that some query among tokens [first, last] of the sequence sees.
static KeyRange visible_keys(const AttentionProblem& p, const Sequence& s, const KeyList& list, int64_t first,
                             int64_t last) {
  const int64_t shift = s.key_length - s.query_length;  // bottom-right: the last query stands at the last key
  KeyRange range{0, list.count};
  if (p.causal) range.end = list.first_from(last + shift + 1);
  if (p.sliding_window > 0) range.begin = list.first_from(first + shift - p.sliding_window + 1);
  range.end = max(range.begin, range.end);
  return range;
}

// The list of each sequence.
class KeyLists {
 public:
  explicit KeyLists(const AttentionProblem& p)
      : lists_(p.num_sequences * static_cast<int64_t>(sizeof(KeyList))),
        positions_(p.padding != nullptr ? total_length(p) * static_cast<int64_t>(sizeof(int32_t)) : 0) {
    auto* list = reinterpret_cast<KeyList*>(lists_.data());
    auto* free = reinterpret_cast<int32_t*>(positions_.data());
    for (int64_t i = 0; i < p.num_sequences; ++i) {
      const Sequence& s = p.sequences[i];
      list[i] = {nullptr, s.key_length};
      if (p.padding == nullptr) continue;
      const uint8_t* visible = p.padding + s.batch * p.padding_stride[0] + s.key_start * p.padding_stride[1];
      int64_t count = 0;
      for (int64_t j = 0; j < s.key_length; ++j) {
        free[count] = static_cast<int32_t>(j);
        count += visible[j * p.padding_stride[1]] != 0;
      }
      if (count < s.key_length) list[i] = {free, count};
      free += s.key_length;
    }
  }

  const KeyList& operator[](int64_t sequence) const {
    return reinterpret_cast<const KeyList*>(lists_.data())[sequence];
  }

 private:
  static int64_t total_length(const AttentionProblem& p) {
    int64_t total = 0;
    for (int64_t i = 0; i < p.num_sequences; ++i) total += p.sequences[i].key_length;
    return total;
  }

  Buffer lists_, positions_;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
