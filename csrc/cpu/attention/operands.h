// What a block of queries computes on, as the records of tiles/: the queries themselves, and the keys and values of a
// prefix or of a sequence.
#pragma once

#include "../tiles/packed_tiles.h"
#include "../tiles/query_block.h"
#include "problem.h"
#include "visible_keys.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

inline int64_t group_size(const AttentionProblem& p) { return p.num_heads / p.num_kv_heads; }

// How many blocks the queries of a sequence and one key/value head make.
inline int64_t num_query_blocks(const AttentionProblem& p, const Sequence& s) {
  return ceil_div(s.query_length * group_size(p), kBlockM);
}

// Queries [first, first + kBlockM) of one sequence and one key/value head, as many as there are.
template <class Arithmetic>
static void fill_block(QueryBlock& block, const AttentionProblem& p, const Sequence& s, int64_t kv_head,
                       int64_t first) {
  const int64_t group = group_size(p), last = min(first + kBlockM, s.query_length * group);
  block.count = block.padded = 0;
  int64_t token = first / group, head = first % group;
  for (int64_t n = first; n < last; ++n) {
    block.add({s.batch, kv_head * group + head, s.query_start + token}, query_step<Arithmetic>);
    if (++head == group) {
      head = 0;
      ++token;
    }
  }
}

// The rows of `view`, which is [B, H, T, dim], that the block of queries [first, first + kBlockM) reads or writes.
template <class AnyView>
static void prefetch_queries(Prefetcher& prefetcher, const AnyView& view, const AttentionProblem& p, const Sequence& s,
                             int64_t kv_head, int64_t first, int64_t dim) {
  const int64_t group = group_size(p), size = size_of(view.dtype);
  const int64_t begin = first / group, end = min(ceil_div(first + kBlockM, group), s.query_length);
  for (int64_t g = 0; g < group; ++g) {
    const TokenIndex at{s.batch, kv_head * group + g, s.query_start + begin};
    prefetcher.add(static_cast<const char*>(view.data) + token_offset(view.stride, at) * size, view.stride[2] * size,
                   end - begin, dim * size);
  }
}

// Where a query's number lies in [B, H, T], contiguous along T.
inline int64_t lse_offset(const int64_t (&stride)[2], const TokenIndex& at) {
  return at.batch * stride[0] + at.head * stride[1] + at.token;
}

struct KeyValues {
  HeadKeys key, value;
};

static KeyValues prefix_key_values(const AttentionProblem& p, int64_t prefix, int64_t kv_head, int64_t length) {
  const KeyList all{nullptr, length};
  return {{&p.prefix_key, prefix, kv_head, 0, all, p.head_dim},
          {&p.prefix_value, prefix, kv_head, 0, all, p.value_dim}};
}

static KeyValues sequence_key_values(const AttentionProblem& p, const Sequence& s, int64_t kv_head,
                                     const KeyList& list) {
  return {{&p.key, s.batch, kv_head, s.key_start, list, p.head_dim},
          {&p.value, s.batch, kv_head, s.key_start, list, p.value_dim}};
}

// The tile that starts at key `first`, of keys that end before `end`.
static void prefetch_key_values(Prefetcher& prefetcher, const KeyValues& from, int64_t first, int64_t end) {
  prefetch_keys(prefetcher, from.key, first, end);
  prefetch_keys(prefetcher, from.value, first, end);
}

// The same where they may be packed, with key `range.begin` as number 0 of the packed ones.
template <class Element>
static void prefetch_tile(Prefetcher& prefetcher, const PackedTiles<Element>& packed_keys,
                          const PackedTiles<Element>& packed_values, const KeyValues& from, int64_t first,
                          const KeyRange& range) {
  if (first >= range.end) return;
  const int64_t number = first - range.begin, keys = min<int64_t>(kBlockN, range.end - first);
  packed_keys.prefetch(prefetcher, number, keys, [&] { prefetch_keys(prefetcher, from.key, first, range.end); });
  packed_values.prefetch(prefetcher, number, keys, [&] { prefetch_keys(prefetcher, from.value, first, range.end); });
}

// How many of `keys` keys are worth keeping packed: none where a window lets the keys of every block begin elsewhere.
static int64_t keys_to_pack(const AttentionProblem& p, int64_t keys) { return p.sliding_window > 0 ? 0 : keys; }

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
