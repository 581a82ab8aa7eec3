// How decode is cut into work items, from the shape alone.
//
// Every query gets its softmax in *splits*, parts of its keys, that are merged at the end by their m and l:
// - of the prefix. The queries of *all* sequences that name it form one block, so that it is read once and not once a
//   sequence (Juravsky et al. 2024, Hydragen);
// - of the sequence's own keys, so that one long sequence keeps every core busy (Flash-Decoding).
#pragma once

#include "operands.h"
#include "prefix_groups.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// How the keys of one sequence are split: first those of its prefix, then its own.
struct KeySplits {
  int64_t prefix_splits, splits;
  int64_t first_partial;  // the partial result of its first query, split and head
  KeyRange keys;          // of its own, that its queries see
};

struct DecodeItem {
  int64_t kv_head, split;
  int64_t sequence;             // whose keys are read; -1: those of a prefix
  int64_t prefix, first_query;  // then: which prefix, and from which of the queries that name it on
};

class DecodeSchedule {
 public:
  DecodeSchedule(const AttentionProblem& p, const KeyLists& lists)
      : p_(p),
        groups_(p),
        splits_memory_(p.num_sequences * static_cast<int64_t>(sizeof(KeySplits))),
        items_memory_(split_keys(lists) * static_cast<int64_t>(sizeof(DecodeItem))) {
    list_items();
  }

  int64_t num_items() const { return num_items_; }
  int64_t num_partials() const { return num_partials_; }
  const PrefixGroups& groups() const { return groups_; }
  const DecodeItem& item(int64_t index) const { return items_[index]; }
  const KeySplits& splits(int64_t sequence) const { return splits_[sequence]; }

  // Queries of one key/value head: of one sequence, and of all that name a prefix.
  int64_t queries_of(int64_t sequence) const { return p_.sequences[sequence].query_length * group_size(p_); }
  int64_t queries_of_prefix(int64_t prefix) const {
    int64_t queries = 0;
    for (const int64_t* i = groups_.begin(prefix); i != groups_.end(prefix); ++i) queries += queries_of(*i);
    return queries;
  }

  // The number of the partial result of one query.
  int64_t partial(int64_t sequence, int64_t kv_head, int64_t split, int64_t query) const {
    const KeySplits& s = splits_[sequence];
    return s.first_partial + (kv_head * s.splits + split) * queries_of(sequence) + query;
  }

  // The keys of one of `splits` splits, whole tiles of them.
  static KeyRange split_range(const KeyRange& keys, int64_t split, int64_t splits) {
    const int64_t tiles = ceil_div(keys.size(), kBlockN);
    return {keys.begin + tiles * split / splits * kBlockN,
            min(keys.begin + tiles * (split + 1) / splits * kBlockN, keys.end)};
  }

 private:
  static constexpr int64_t kTargetItems = 64;
  static constexpr int64_t kLeastKeys = 256;  // of a split

  // Into how many splits `keys` keys are cut where `blocks` blocks of queries see them.
  static int64_t num_splits(int64_t keys, int64_t blocks) {
    return max<int64_t>(keys > 0, min(ceil_div(kTargetItems, max<int64_t>(blocks, 1)), keys / kLeastKeys));
  }

  // Fills splits_; returns how many work items that makes.
  int64_t split_keys(const KeyLists& lists) {
    splits_ = reinterpret_cast<KeySplits*>(splits_memory_.data());
    const int64_t heads = p_.num_kv_heads;
    for (int64_t prefix = -1; prefix < groups_.num_prefixes(); ++prefix) {
      if (groups_.size(prefix) == 0) continue;
      const int64_t length = prefix >= 0 ? p_.sequences[*groups_.begin(prefix)].prefix_length : 0;
      const int64_t blocks = ceil_div(queries_of_prefix(prefix), kBlockM);
      const int64_t prefix_splits = num_splits(length, heads * blocks);
      num_items_ += heads * blocks * prefix_splits;
      for (const int64_t* i = groups_.begin(prefix); i != groups_.end(prefix); ++i) {
        const Sequence& s = p_.sequences[*i];
        KeyRange keys{0, 0};
        if (s.query_length > 0) keys = visible_keys(p_, s, lists[*i], 0, s.query_length - 1);
        const int64_t own = num_splits(keys.size(), heads * p_.num_sequences);
        splits_[*i] = {prefix_splits, prefix_splits + own, num_partials_, keys};
        num_partials_ += heads * splits_[*i].splits * queries_of(*i);
        num_items_ += heads * own;
      }
    }
    return num_items_;
  }

  void list_items() {
    items_ = reinterpret_cast<DecodeItem*>(items_memory_.data());
    DecodeItem* next = items_;
    const int64_t heads = p_.num_kv_heads;
    for (int64_t prefix = 0; prefix < groups_.num_prefixes(); ++prefix) {
      if (groups_.size(prefix) == 0) continue;
      const int64_t queries = queries_of_prefix(prefix), splits = splits_[*groups_.begin(prefix)].prefix_splits;
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t query = 0; query < queries; query += kBlockM)
          for (int64_t split = 0; split < splits; ++split) *next++ = {h, split, -1, prefix, query};
    }
    for (int64_t i = 0; i < p_.num_sequences; ++i)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t split = splits_[i].prefix_splits; split < splits_[i].splits; ++split)
          *next++ = {h, split, i, -1, 0};
  }

  const AttentionProblem& p_;
  const PrefixGroups groups_;
  KeySplits* splits_ = nullptr;
  DecodeItem* items_ = nullptr;
  int64_t num_items_ = 0, num_partials_ = 0;
  const Buffer splits_memory_, items_memory_;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
