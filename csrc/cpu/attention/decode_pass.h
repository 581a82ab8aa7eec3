// Decode: a few queries of each sequence over a long, shared prefix and long sequences. The splits of decode_schedule.h
// are computed in parallel, then merged.
#pragma once

#include "decode_block.h"
#include "decode_schedule.h"
#include "work_items.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

class DecodePass {
 public:
  static bool fits(const AttentionProblem& p) {
    for (int64_t i = 0; i < p.num_sequences; ++i)
      if (p.sequences[i].query_length * group_size(p) > kDecodeQueries) return false;
    return true;
  }

  explicit DecodePass(const AttentionForwardProblem& p)
      : p_(p),
        block_dv_(round_up(p.value_dim, kLanes)),
        lists_(p),
        schedule_(p, lists_),
        bf16_prefix_(are_bf16(p.query, p.prefix_key, p.prefix_value)),
        bf16_tiles_(Bfloat16::kDepth > 1 && are_bf16(p.query, p.key, p.value)),
        partials_(schedule_.num_partials() * partial_size() * static_cast<int64_t>(sizeof(float))) {}

  void run(const Parallel& parallel) const {
    auto work = [&](const WorkItem& index, char* memory) {
      const DecodeItem& item = schedule_.item(index.index);
      Arena arena(memory);
      if (item.sequence < 0 && fills_tile(item.prefix)) {
        bf16_prefix_ ? run_prefix_tile<Bfloat16>(item, arena) : run_prefix_tile<Float32>(item, arena);
      } else if (item.sequence >= 0 && bf16_tiles_) {
        run_sequence_tile<Bfloat16>(item, arena);
      } else {
        DecodeScratch scratch(p_, arena);
        item.sequence < 0 ? run_prefix(item, scratch) : run_sequence(item, scratch);
      }
    };
    for_each_work_item<Bfloat16::ThreadState>(parallel, schedule_.num_items(), scratch_bytes(), work);
    auto merge = [&](const WorkItem& item, char* memory) {
      merge_splits(item.index / p_.num_kv_heads, item.index % p_.num_kv_heads, reinterpret_cast<float*>(memory));
    };
    for_each_work_item(parallel, p_.num_sequences * p_.num_kv_heads, block_dv_ * 4, merge);
  }

 private:
  static bool are_bf16(const ConstView& a, const ConstView& b, const ConstView& c) {
    return a.dtype == DType::bf16 && b.dtype == DType::bf16 && c.dtype == DType::bf16;
  }

  // Whether the queries that name a prefix fill enough of a transposed tile to be worth one.
  bool fills_tile(int64_t prefix) const { return schedule_.queries_of_prefix(prefix) > kDecodeQueries / 2; }

  // As much as the work item that needs most: one call may have some of each kind.
  int64_t scratch_bytes() const {
    Arena float32, bfloat16, decode;
    ForwardScratch<Float32>(p_, 0, 0, float32);
    ForwardScratch<Bfloat16>(p_, 0, 0, bfloat16);
    DecodeScratch(p_, decode);
    return max(max(float32.used(), bfloat16.used()), decode.used());
  }

  // A query of a block that holds those of several sequences.
  struct Owner {
    int64_t sequence, query;
  };

  // The queries that name a prefix, of one head, from item.first_query on.
  template <class Arithmetic>
  void fill_shared_block(QueryBlock& block, Owner (&owner)[kBlockM], const DecodeItem& item) const {
    const int64_t group = group_size(p_);
    int64_t place = -item.first_query;
    for (const int64_t* i = schedule_.groups().begin(item.prefix); i != schedule_.groups().end(item.prefix); ++i)
      for (int64_t n = 0; n < schedule_.queries_of(*i); ++n, ++place) {
        if (place < 0 || place >= kBlockM) continue;
        const Sequence& s = p_.sequences[*i];
        owner[place] = {*i, n};
        block.add({s.batch, item.kv_head * group + n % group, s.query_start + n / group}, query_step<Arithmetic>);
      }
  }

  KeyValues prefix_keys(const DecodeItem& item, const Owner& owner) const {
    return prefix_key_values(p_, item.prefix, item.kv_head, p_.sequences[owner.sequence].prefix_length);
  }
  KeyRange prefix_range(const DecodeItem& item, const Owner& owner) const {
    const KeyRange all{0, p_.sequences[owner.sequence].prefix_length};
    return DecodeSchedule::split_range(all, item.split, schedule_.splits(owner.sequence).prefix_splits);
  }
  KeyRange sequence_range(const DecodeItem& item) const {
    const KeySplits& s = schedule_.splits(item.sequence);
    return DecodeSchedule::split_range(s.keys, item.split - s.prefix_splits, s.splits - s.prefix_splits);
  }

  // A split of a prefix against the queries of all sequences that name it: many queries.
  template <class Arithmetic>
  void run_prefix_tile(const DecodeItem& item, Arena& arena) const {
    ForwardScratch<Arithmetic> w(p_, 0, 0, arena);
    QueryBlock block;
    Owner owner[kBlockM] = {};
    fill_shared_block<Arithmetic>(block, owner, item);
    begin_block(w, p_, block, nullptr);
    update_prefix(w, p_, prefix_keys(item, owner[0]), prefix_range(item, owner[0]), block.padded);
    for (int i = 0; i < block.count; ++i) write_partial(owner[i], item, w, i);
  }

  // The same with few queries.
  void run_prefix(const DecodeItem& item, DecodeScratch& w) const {
    QueryBlock block;
    Owner owner[kBlockM];
    fill_shared_block<Float32>(block, owner, item);
    decode_block(w, p_, block, prefix_keys(item, owner[0]), prefix_range(item, owner[0]), nullptr, nullptr);
    for (int i = 0; i < block.count; ++i) write_partial(owner[i], item, w, i);
  }

  // A split of one sequence's keys against its own queries.
  void run_sequence(const DecodeItem& item, DecodeScratch& w) const {
    const Sequence& s = p_.sequences[item.sequence];
    const KeyList& list = lists_[item.sequence];
    const int64_t group = group_size(p_);
    QueryBlock block;
    fill_block<Float32>(block, p_, s, item.kv_head, 0);
    KeyRange visible[kDecodeQueries];
    for (int i = 0; i < block.count; ++i) visible[i] = visible_keys(p_, s, list, i / group, i / group);
    decode_block(w, p_, block, sequence_key_values(p_, s, item.kv_head, list), sequence_range(item), visible,
                 p_.mask.kind == Mask::Kind::none ? nullptr : &p_.mask);
    for (int i = 0; i < block.count; ++i) write_partial({item.sequence, i}, item, w, i);
  }

  // The same in a transposed tile, where the CPU multiplies tiles so quickly that the columns without a query do not
  // matter.
  template <class Arithmetic>
  void run_sequence_tile(const DecodeItem& item, Arena& arena) const {
    ForwardScratch<Arithmetic> w(p_, 0, 0, arena);
    const Sequence& s = p_.sequences[item.sequence];
    const KeyValues keys = sequence_key_values(p_, s, item.kv_head, lists_[item.sequence]);
    const KeyRange range = sequence_range(item);
    QueryBlock block;
    fill_block<Arithmetic>(block, p_, s, item.kv_head, 0);
    begin_block(w, p_, block, nullptr);
    update_sequence(w, p_, block, s, keys, range, 0, true,
                    [&](int64_t key) { prefetch_key_values(w.prefetcher, keys, key + kBlockN, range.end); });
    for (int i = 0; i < block.count; ++i) write_partial({item.sequence, i}, item, w, i);
  }

  // A partial result: acc, m, l.
  int64_t partial_size() const { return block_dv_ + kLanes; }
  float* partial(const Owner& owner, int64_t kv_head, int64_t split) const {
    const int64_t number = schedule_.partial(owner.sequence, kv_head, split, owner.query);
    return reinterpret_cast<float*>(partials_.data()) + number * partial_size();
  }

  // From query i of a scratch.
  template <class Scratch>
  void write_partial(const Owner& owner, const DecodeItem& item, const Scratch& w, int i) const {
    float* to = partial(owner, item.kv_head, item.split);
    const float* acc = w.acc + i * block_dv_;
    for (int64_t d = 0; d < block_dv_; d += kLanes) store(to + d, load(acc + d));
    to[block_dv_] = w.m[i];
    to[block_dv_ + 1] = w.l[i];
  }

  // All splits of one sequence's queries become outputs and log-sum-exps.
  void merge_splits(int64_t sequence, int64_t kv_head, float* acc) const {
    QueryBlock block;
    fill_block<Float32>(block, p_, p_.sequences[sequence], kv_head, 0);
    const int64_t splits = schedule_.splits(sequence).splits;
    for (int i = 0; i < block.count; ++i) {
      const TokenIndex& query = block.query[i];
      const float sink = p_.sinks != nullptr ? p_.sinks[query.head] * kLog2e : -kInfinity;
      float m = max(sink, kLowest);
      for (int64_t n = 0; n < splits; ++n) m = max(m, partial({sequence, i}, kv_head, n)[block_dv_]);
      float l = exp2(splat(sink - m))[0];
      for (int64_t d = 0; d < block_dv_; d += kLanes) store(acc + d, Vec{});
      for (int64_t n = 0; n < splits; ++n) {
        const float* part = partial({sequence, i}, kv_head, n);
        const float alpha = exp2(splat(part[block_dv_] - m))[0];
        l += alpha * part[block_dv_ + 1];
        for (int64_t d = 0; d < block_dv_; d += kLanes) store(acc + d, load(acc + d) + load(part + d) * alpha);
      }
      store_row(static_cast<char*>(p_.out.data) + token_offset(p_.out.stride, query) * size_of(p_.out.dtype),
                p_.out.dtype, acc, p_.value_dim, l != 0 ? 1.0f / l : 0.0f);
      if (p_.lse != nullptr)
        p_.lse[lse_offset(p_.lse_stride, query)] = l != 0 ? (m + log2_or_nan(splat(l))[0]) * kLn2 : -kInfinity;
    }
  }

  const AttentionForwardProblem& p_;
  const int64_t block_dv_;
  const KeyLists lists_;
  const DecodeSchedule schedule_;
  const bool bf16_prefix_;  // queries and prefix are bfloat16
  const bool bf16_tiles_;   // queries and keys are, on a CPU that multiplies tiles of them
  const Buffer partials_;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
