// Backward of one block of queries: over the tiles of its prefix, then of its sequence.
//
// dQ of the block stays in the cache over all tiles; dK and dV of the whole sequence (and of the prefix) accumulate in
// float32: in place if they are wanted as float32 rows near each other, else in scratch.
#pragma once

#include "backward_schedule.h"
#include "backward_tile.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

struct BackwardBlock {
  const Chunk* chunk;
  int64_t kv_head, first_query;
};

// Fills w.k, w.v and, if wanted, w.k_columns with `keys` keys from `first_key` on, which is number `number` of the
// packed ones.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static void load_tile(BackwardScratch<Arithmetic>& w, const KeyValues& from, int64_t first_key, int keys,
                      PackedTiles<Element>& packed_keys, PackedTiles<Element>& packed_values, int64_t number,
                      bool wants_columns) {
  w.k = packed_keys.get(number, keys, [&](Element* buffer) {
    return Arithmetic::key_rows(buffer, w.elements_d, from.key, first_key, keys);
  });
  w.v = packed_values.get(number, keys, [&](Element* buffer) {
    return Arithmetic::key_rows(buffer, w.elements_dv, from.value, first_key, keys);
  });
  if (wants_columns) w.k_columns = Arithmetic::columns(w.key_columns_buffer, w.block_d, w.k, keys);
}

// What the block `next` reads first.
static void prefetch_block(Prefetcher& prefetcher, const AttentionBackwardProblem& p, const BackwardBlock& next) {
  const Sequence& s = p.sequences[next.chunk->sequence];
  if (s.query_length == 0) return;
  prefetch_queries(prefetcher, p.query, p, s, next.kv_head, next.first_query, p.head_dim);
  prefetch_queries(prefetcher, p.grad_out, p, s, next.kv_head, next.first_query, p.value_dim);
  prefetch_queries(prefetcher, p.out, p, s, next.kv_head, next.first_query, p.value_dim);
}

// The rows of `gradients` before row `rows` that this block is the first to write.
template <class Arithmetic>
static void prefetch_unwritten(BackwardScratch<Arithmetic>& w, const KeyGradients& gradients, int64_t rows) {
  const int64_t bytes = sizeof(float), rest = rows - gradients.written;
  const GradientRows value = gradients.value.from(gradients.written), key = gradients.key.from(gradients.written);
  w.prefetcher.add(value.data, value.stride * bytes, rest, w.block_dv * bytes);
  w.prefetcher.add(key.data, key.stride * bytes, rest, w.block_d * bytes);
}

// The block `at`, and `next` (or null) after it. `gradients` and `prefix_gradients` accumulate if they are wanted.
template <class Arithmetic>
static void backward_block(const AttentionBackwardProblem& p, const Wanted& wanted, const BackwardBlock& at,
                           const BackwardBlock* next, const KeyList& list, KeyGradients& gradients,
                           KeyGradients& prefix_gradients, BackwardScratch<Arithmetic>& w) {
  const Chunk& chunk = *at.chunk;
  const Sequence& s = p.sequences[chunk.sequence];
  const int64_t group = group_size(p);
  QueryBlock block;
  fill_block<Arithmetic>(block, p, s, at.kv_head, at.first_query);
  begin_block(w, p, block);
  const KeyValues sequence = sequence_key_values(p, s, at.kv_head, list);
  KeyRange range{0, 0};
  if (wanted.query || wanted.keys)
    range = visible_keys(p, s, list, at.first_query / group, (at.first_query + block.count - 1) / group);
  prefetch_tile(w.prefetcher, w.packed_keys, w.packed_values, sequence, range.begin, range);
  if (wanted.keys) prefetch_unwritten(w, gradients, range.end - chunk.keys.begin);
  if (wanted.query) prefetch_queries(w.prefetcher, p.grad_query, p, s, at.kv_head, at.first_query, p.head_dim);

  bool first = true;
  const int64_t prefix_length = s.prefix >= 0 && (wanted.query || wanted.prefix) ? s.prefix_length : 0;
  const KeyValues prefix = prefix_key_values(p, s.prefix, at.kv_head, prefix_length);
  for (int64_t key = 0; key < prefix_length; key += kBlockN, first = false) {
    const int keys = static_cast<int>(min<int64_t>(kBlockN, prefix_length - key));
    load_tile(w, prefix, key, keys, w.packed_prefix_keys, w.packed_prefix_values, key, wanted.query);
    plan_full_tile(w.plan, keys, block.padded);
    const KeyGradients tile = prefix_gradients.from(key);
    backward_tile(w, p, wanted.query, first, nullptr, block.count, keys, wanted.prefix ? &tile : nullptr);
    prefix_gradients.written = max(prefix_gradients.written, key + keys);
  }
  for (int64_t key = range.begin; key < range.end; key += kBlockN, first = false) {
    const int keys = static_cast<int>(min<int64_t>(kBlockN, range.end - key));
    load_tile(w, sequence, key, keys, w.packed_keys, w.packed_values, key - range.begin, wanted.query);
    const int64_t after = key + kBlockN;
    prefetch_tile(w.prefetcher, w.packed_keys, w.packed_values, sequence, after, range);
    if (after >= range.end && next != nullptr) prefetch_block(w.prefetcher, p, *next);
    plan_sequence_tile<Arithmetic>(w.plan, p, s, list, key, keys, at.first_query, block.padded);
    const bool masked = p.mask.kind != Mask::Kind::none;
    if (masked) load_mask_tile(w.mask, p.mask, block, sequence.key, key, keys);
    const int64_t row = key - chunk.keys.begin;
    const KeyGradients tile = gradients.from(row);
    backward_tile(w, p, wanted.query, first, masked ? w.mask : nullptr, block.count, keys,
                  wanted.keys ? &tile : nullptr);
    gradients.written = max(gradients.written, row + keys);
  }
  if (!wanted.query) return;
  if (first) w.grad_query.fill_zero(0, block.count, w.block_d);
  if (w.grad_query.data == w.grad_query_buffer)
    store_rows(p.grad_query, block, w.grad_query_buffer, w.block_d, p.head_dim, nullptr);
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
