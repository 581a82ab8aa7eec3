// Forward: one work item a block of queries of one sequence and one key/value head.
#pragma once

#include "online_softmax.h"
#include "prefix_groups.h"
#include "work_items.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

template <class Arithmetic>
class ForwardPass {
 public:
  explicit ForwardPass(const AttentionForwardProblem& p)
      : p_(p), lists_(p), starts_((p.num_sequences + 1) * static_cast<int64_t>(sizeof(int64_t))) {
    auto* start = reinterpret_cast<int64_t*>(starts_.data());
    start[0] = 0;
    int64_t longest = 0, most_blocks = 0;
    for (int64_t i = 0; i < p.num_sequences; ++i) {
      const int64_t blocks = num_query_blocks(p, p.sequences[i]);
      start[i + 1] = start[i] + blocks * p.num_kv_heads;
      longest = max(longest, lists_[i].count);
      most_blocks = max(most_blocks, blocks);
    }
    most_prefix_keys_ = keys_to_pack(p, p.prefix_capacity);
    most_keys_ = most_blocks > 1 ? keys_to_pack(p, longest) : 0;  // a single block leaves its keys to no other
  }

  void run(const Parallel& parallel) const {
    Arena measure;
    ForwardScratch<Arithmetic>(p_, most_prefix_keys_, most_keys_, measure);
    auto work = [&](const WorkItem& item, char* memory) {
      Arena arena(memory);
      ForwardScratch<Arithmetic> scratch(p_, most_prefix_keys_, most_keys_, arena);
      run_block(block_at(item.index), block_at(item.previous), block_at(item.next), scratch);
    };
    for_each_work_item<typename Arithmetic::ThreadState>(parallel, start(p_.num_sequences), measure.used(), work);
  }

 private:
  // A core's own cache holds so many numbers beside everything else.
  static constexpr int64_t kCachedNumbers = 128 * 1024;

  struct Block {
    const Sequence* sequence = nullptr;  // null: no block
    const KeyList* list = nullptr;
    int64_t kv_head = 0, first_query = 0;
    KeyRange range{0, 0};  // the keys it sees

    bool shares_keys(const Block& before) const { return before.sequence == sequence && before.kv_head == kv_head; }
    bool shares_prefix(const Block& before) const {
      return before.sequence != nullptr && before.kv_head == kv_head && before.sequence->prefix == sequence->prefix;
    }

    // Whether its keys are in the core's cache after `before`: the same, and few enough.
    bool finds_keys_cached(const Block& before, const AttentionProblem& p) const {
      return shares_keys(before) && range.size() * (p.head_dim + p.value_dim) <= kCachedNumbers;
    }
  };

  // The first work item of a sequence.
  int64_t start(int64_t sequence) const { return reinterpret_cast<const int64_t*>(starts_.data())[sequence]; }

  // The block of a work item; none for -1. Later blocks of a sequence come first: under a causal mask they take
  // longest.
  Block block_at(int64_t item) const {
    if (item < 0) return {};
    int64_t low = 0, high = p_.num_sequences;  // the sequence with start(low) <= item < start(low + 1)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (start(middle) <= item ? low : high) = middle;
    }
    const Sequence& s = p_.sequences[low];
    const int64_t group = group_size(p_), blocks = num_query_blocks(p_, s), number = item - start(low);
    const int64_t first = (blocks - 1 - number % blocks) * kBlockM, last = min(first + kBlockM, s.query_length * group);
    return {&s, &lists_[low], number / blocks, first,
            visible_keys(p_, s, lists_[low], first / group, (last - 1) / group)};
  }

  void run_block(const Block& at, const Block& previous, const Block& next, ForwardScratch<Arithmetic>& w) const {
    const Sequence& s = *at.sequence;
    QueryBlock block;
    fill_block<Arithmetic>(block, p_, s, at.kv_head, at.first_query);
    begin_block(w, p_, block, p_.sinks);

    for (auto* tiles : {&w.packed_prefix_keys, &w.packed_prefix_values}) tiles->begin(at.shares_prefix(previous));
    for (auto* tiles : {&w.packed_keys, &w.packed_values}) tiles->begin(at.shares_keys(previous));
    const int64_t prefix_length = prefix_of(s) >= 0 ? s.prefix_length : 0;
    update_prefix(w, p_, prefix_key_values(p_, s.prefix, at.kv_head, prefix_length), {0, prefix_length}, block.padded);

    const KeyValues sequence = sequence_key_values(p_, s, at.kv_head, *at.list);
    auto prefetch_next = [&](int64_t key) {
      const int64_t after = key + kBlockN;
      if (!at.finds_keys_cached(previous, p_))
        prefetch_tile(w.prefetcher, w.packed_keys, w.packed_values, sequence, after, at.range);
      if (after >= at.range.end) prefetch_block(w.prefetcher, at, next);
    };
    update_sequence(w, p_, block, s, sequence, at.range, at.first_query, prefix_length == 0, prefetch_next);
    finish_block(w, p_, block);
  }

  // What this block writes, and what the next one reads first.
  void prefetch_block(Prefetcher& prefetcher, const Block& at, const Block& next) const {
    prefetch_queries(prefetcher, p_.out, p_, *at.sequence, at.kv_head, at.first_query, p_.value_dim);
    if (next.sequence == nullptr) return;
    prefetch_queries(prefetcher, p_.query, p_, *next.sequence, next.kv_head, next.first_query, p_.head_dim);
    if (!next.finds_keys_cached(at, p_))
      prefetch_key_values(prefetcher, sequence_key_values(p_, *next.sequence, next.kv_head, *next.list),
                          next.range.begin, next.range.end);
  }

  const AttentionForwardProblem& p_;
  const KeyLists lists_;
  const Buffer starts_;
  int64_t most_prefix_keys_ = 0, most_keys_ = 0;  // that stay packed
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
