// The whole backward pass: groups of chunks in parallel, then the sums that several of them share.
#pragma once

#include "backward_block.h"
#include "backward_reduce.h"
#include "backward_schedule.h"
#include "work_items.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

template <class Arithmetic>
class BackwardPass {
 public:
  explicit BackwardPass(const AttentionBackwardProblem& p)
      : p_(p),
        wanted_{p.grad_query.data != nullptr, p.grad_key.data != nullptr,
                p.grad_prefix_key != nullptr && p.num_prefixes * p.prefix_capacity > 0},
        block_d_(round_up(p.head_dim, kLanes)),
        block_dv_(round_up(p.value_dim, kLanes)),
        prefix_size_(wanted_.prefix ? p.prefix_capacity * (block_d_ + block_dv_) : 0),
        lists_(p),
        schedule_(p, lists_, wanted_.keys, wanted_.prefix, prefix_size_ * kFloat),
        partials_(p.num_kv_heads * schedule_.partial_keys * (block_d_ + block_dv_) * kFloat),
        buffers_(p.num_kv_heads * schedule_.num_buffers * prefix_size_ * kFloat) {}

  void run(const Parallel& parallel) const {
    const int64_t heads = p_.num_kv_heads;
    Arena measure;
    BackwardScratch<Arithmetic>(p_, wanted_, schedule_.most_keys, schedule_.scratch_keys, measure);
    // Later chunks of a sequence take longest under a causal mask: they go first.
    const int64_t last = schedule_.num_groups * heads - 1;
    auto group_at = [&](int64_t item) -> const ChunkGroup& { return schedule_.groups[(last - item) / heads]; };
    auto head_at = [&](int64_t item) { return (last - item) % heads; };
    auto work = [&](const WorkItem& item, char* memory) {
      Arena arena(memory);
      BackwardScratch<Arithmetic> scratch(p_, wanted_, schedule_.most_keys, schedule_.scratch_keys, arena);
      BackwardBlock after{};
      if (item.next >= 0) after = first_block(schedule_.chunks[group_at(item.next).first_chunk], head_at(item.next));
      run_group(group_at(item.index), head_at(item.index), item.next >= 0 ? &after : nullptr, scratch);
    };
    if (wanted_.query || wanted_.keys || wanted_.prefix)
      for_each_work_item<typename Arithmetic::ThreadState>(parallel, schedule_.num_groups * heads, measure.used(),
                                                           work);
    if (wanted_.keys) reduce_keys(parallel);
    if (wanted_.prefix) reduce_prefixes(parallel);
  }

 private:
  static constexpr int64_t kFloat = sizeof(float);
  static constexpr int64_t kReducedKeys = 128;  // a work item of the reduction of key gradients

  static BackwardBlock first_block(const Chunk& chunk, int64_t kv_head) {
    return {&chunk, kv_head, chunk.first_block * kBlockM};
  }

  // The partial gradients of keys and of values of one head, and one of its buffers of prefix gradients.
  float* partial_keys(int64_t kv_head) const {
    return reinterpret_cast<float*>(partials_.data()) + kv_head * schedule_.partial_keys * (block_d_ + block_dv_);
  }
  float* partial_values(int64_t kv_head) const { return partial_keys(kv_head) + schedule_.partial_keys * block_d_; }
  float* prefix_buffer(int64_t kv_head, int64_t buffer) const {
    return reinterpret_cast<float*>(buffers_.data()) + (kv_head * schedule_.num_buffers + buffer) * prefix_size_;
  }

  // `after`: the block that the worker does next, or null.
  void run_group(const ChunkGroup& group, int64_t kv_head, const BackwardBlock* after,
                 BackwardScratch<Arithmetic>& w) const {
    KeyGradients prefix;
    if (wanted_.prefix && group.prefix >= 0) {
      prefix = {{w.grad_prefix_key, block_d_}, {w.grad_prefix_value, block_dv_}};
      if (group.buffer >= 0) {
        float* buffer = prefix_buffer(kv_head, group.buffer);
        prefix = {{buffer, block_d_}, {buffer + p_.prefix_capacity * block_d_, block_dv_}};
      }
    }
    w.packed_prefix_keys.begin(false);
    w.packed_prefix_values.begin(false);
    for (int64_t i = group.first_chunk; i < group.last_chunk; ++i) {
      const bool last = i + 1 == group.last_chunk;
      const BackwardBlock next = last ? BackwardBlock{} : first_block(schedule_.chunks[i + 1], kv_head);
      run_chunk(schedule_.chunks[i], kv_head, last ? after : &next, prefix, w);
    }
    fill_unwritten(prefix, p_.prefix_capacity);
    if (prefix.key.data != nullptr && group.buffer < 0)
      write_prefix(group.prefix, kv_head, 1, prefix.key.data, prefix.value.data, w.query_buffer, w.grad_out_buffer);
  }

  void run_chunk(const Chunk& chunk, int64_t kv_head, const BackwardBlock* after, KeyGradients& prefix_gradients,
                 BackwardScratch<Arithmetic>& w) const {
    const Sequence& s = p_.sequences[chunk.sequence];
    const KeyList& list = lists_[chunk.sequence];
    KeyGradients gradients = key_gradients(chunk, kv_head, w);
    w.packed_keys.begin(false);
    w.packed_values.begin(false);
    for (int64_t block = chunk.first_block; block < chunk.last_block; ++block) {
      const bool last = block + 1 == chunk.last_block;
      const BackwardBlock at{&chunk, kv_head, block * kBlockM}, next{&chunk, kv_head, (block + 1) * kBlockM};
      backward_block(p_, wanted_, at, last ? after : &next, list, gradients, prefix_gradients, w);
    }
    fill_unwritten(gradients, chunk.keys.size());
    if (!wanted_.keys || chunk.parts > 1) return;
    finish_keys(p_.grad_key, s, list, chunk, gradients.key.data, w.grad_key, kv_head, p_.head_dim, block_d_,
                w.query_buffer);
    finish_keys(p_.grad_value, s, list, chunk, gradients.value.data, w.grad_value, kv_head, p_.value_dim, block_dv_,
                w.grad_out_buffer);
  }

  // Where the gradients of a chunk's keys accumulate.
  KeyGradients key_gradients(const Chunk& chunk, int64_t kv_head, BackwardScratch<Arithmetic>& w) const {
    if (!wanted_.keys) return {};
    if (chunk.partial >= 0)
      return {{partial_keys(kv_head) + chunk.partial * block_d_, block_d_},
              {partial_values(kv_head) + chunk.partial * block_dv_, block_dv_}};
    if (lists_[chunk.sequence].position != nullptr)  // with padding, rows of the gradient are missing from the list
      return {{w.grad_key, block_d_}, {w.grad_value, block_dv_}};
    const Sequence& s = p_.sequences[chunk.sequence];
    const TokenIndex at{s.batch, kv_head, s.key_start + chunk.keys.begin};
    return {in_place_or(w.grad_key, p_.grad_key, at, chunk.keys.size(), p_.head_dim, block_d_),
            in_place_or(w.grad_value, p_.grad_value, at, chunk.keys.size(), p_.value_dim, block_dv_)};
  }

  // The whole gradient of the keys (or values) of one chunk and one head, from sums that are in place or in `buffer`.
  static void finish_keys(const View& to, const Sequence& s, const KeyList& list, const Chunk& chunk, const float* sums,
                          const float* buffer, int64_t kv_head, int64_t dim, int64_t width, float* row) {
    auto write = [&](int64_t first, int64_t last) {
      write_key_gradient(to, s, list, &chunk, &sums, 1, kv_head, first, last, dim, width, row);
    };
    if (sums == buffer) return write(0, s.key_length);
    write(0, chunk.keys.begin);
    write(chunk.keys.end, s.key_length);
  }

  // Zeros in those of `rows` rows that nothing was written to.
  void fill_unwritten(const KeyGradients& gradients, int64_t rows) const {
    if (gradients.key.data != nullptr) gradients.fill_zero(gradients.written, rows, block_d_, block_dv_);
  }

  void write_prefix(int64_t prefix, int64_t kv_head, int64_t buffers, const float* keys, const float* values,
                    float* key_row, float* value_row) const {
    const int64_t tokens = p_.prefix_capacity, first = (prefix * p_.num_kv_heads + kv_head) * tokens;
    write_prefix_gradient(p_.grad_prefix_key + first * p_.head_dim, keys, prefix_size_, buffers, tokens, p_.head_dim,
                          block_d_, key_row);
    write_prefix_gradient(p_.grad_prefix_value + first * p_.value_dim, values, prefix_size_, buffers, tokens,
                          p_.value_dim, block_dv_, value_row);
  }

  // Sequences of several chunks: ranges of keys in parallel, chunks added in order.
  void reduce_keys(const Parallel& parallel) const {
    for (int64_t i = 0; i < schedule_.num_chunks; i += schedule_.chunks[i].parts) {
      const Chunk* chunks = schedule_.chunks + i;
      if (chunks->parts == 1) continue;
      const Sequence& s = p_.sequences[chunks->sequence];
      const int64_t ranges = ceil_div(s.key_length, kReducedKeys), parts = chunks->parts;
      auto work = [&](const WorkItem& item, char* memory) {
        const int64_t kv_head = item.index / ranges, first = item.index % ranges * kReducedKeys;
        const int64_t last = min(first + kReducedKeys, s.key_length);
        Arena arena(memory);
        auto* row = arena.allocate<float>(max(block_d_, block_dv_));
        auto* sums = arena.allocate<const float*>(parts);
        for (int64_t n = 0; n < parts; ++n) sums[n] = partial_keys(kv_head) + chunks[n].partial * block_d_;
        write_key_gradient(p_.grad_key, s, lists_[chunks->sequence], chunks, sums, parts, kv_head, first, last,
                           p_.head_dim, block_d_, row);
        for (int64_t n = 0; n < parts; ++n) sums[n] = partial_values(kv_head) + chunks[n].partial * block_dv_;
        write_key_gradient(p_.grad_value, s, lists_[chunks->sequence], chunks, sums, parts, kv_head, first, last,
                           p_.value_dim, block_dv_, row);
      };
      Arena measure;
      measure.allocate<float>(max(block_d_, block_dv_));
      measure.allocate<const float*>(parts);
      for_each_work_item(parallel, p_.num_kv_heads * ranges, measure.used(), work);
    }
  }

  // Prefixes with several buffers: added in order. Prefixes that no sequence names: zeros.
  void reduce_prefixes(const Parallel& parallel) const {
    const int64_t heads = p_.num_kv_heads;
    Buffer memory_of_buffers((2 * p_.num_prefixes) * static_cast<int64_t>(sizeof(int64_t)));
    auto* first_buffer = reinterpret_cast<int64_t*>(memory_of_buffers.data());
    int64_t* count = first_buffer + p_.num_prefixes;
    for (int64_t e = 0; e < p_.num_prefixes; ++e) count[e] = 0;
    for (int64_t i = 0; i < schedule_.num_groups; ++i) {
      const ChunkGroup& group = schedule_.groups[i];
      if (group.prefix < 0) continue;
      if (count[group.prefix]++ == 0) first_buffer[group.prefix] = group.buffer;
    }
    auto work = [&](const WorkItem& item, char* memory) {
      const int64_t prefix = item.index / heads, kv_head = item.index % heads, tokens = p_.prefix_capacity;
      if (count[prefix] == 0) {
        fill_zero(p_.grad_prefix_key + item.index * tokens * p_.head_dim, tokens * p_.head_dim);
        fill_zero(p_.grad_prefix_value + item.index * tokens * p_.value_dim, tokens * p_.value_dim);
      } else if (first_buffer[prefix] >= 0) {
        const float* keys = prefix_buffer(kv_head, first_buffer[prefix]);
        auto* row = reinterpret_cast<float*>(memory);
        write_prefix(prefix, kv_head, count[prefix], keys, keys + tokens * block_d_, row, row);
      }
    };
    for_each_work_item(parallel, p_.num_prefixes * heads, max(block_d_, block_dv_) * kFloat, work);
  }

  const AttentionBackwardProblem& p_;
  const Wanted wanted_;
  const int64_t block_d_, block_dv_, prefix_size_;  // the last in floats, of one head's prefix
  const KeyLists lists_;
  const BackwardSchedule schedule_;
  const Buffer partials_, buffers_;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
