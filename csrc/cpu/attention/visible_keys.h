// Which keys of a sequence exist at all, and which of them a span of queries can see.
//
// Padding is handled by leaving the padded keys out: a sequence's visible keys are listed once, and
// everything after works on places in that list ("slots"). Left, right and scattered padding then
// cost nothing, and whatever bytes lie at padded places are never read.
#pragma once

#include "../tiles/arena.h"
#include "problem.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

struct KeyList {
  const int32_t* position;  // of slot i, counted from the sequence's first key; null: i itself
  int64_t count;

  int64_t operator[](int64_t slot) const { return position != nullptr ? position[slot] : slot; }

  // The first slot whose position is >= `wanted`.
  int64_t first_from(int64_t wanted) const {
    if (position == nullptr) return min(max<int64_t>(wanted, 0), count);
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (position[middle] < wanted)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

struct SlotRange {
  int64_t begin, end;
};

// The slots that some query among tokens [first, last] of the sequence sees.
static SlotRange visible_slots(const AttentionProblem& p, const Sequence& s, const KeyList& keys, int64_t first,
                               int64_t last) {
  const int64_t shift = s.key_length - s.query_length;  // bottom-right: the last query, the last key
  SlotRange range{0, keys.count};
  if (p.causal) range.end = keys.first_from(last + shift + 1);
  if (p.sliding_window > 0) range.begin = keys.first_from(first + shift - p.sliding_window + 1);
  range.end = max(range.begin, range.end);
  return range;
}

// The lists of all sequences.
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
