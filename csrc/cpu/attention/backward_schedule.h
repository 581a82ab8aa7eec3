// How the backward pass is cut into work items, from the shape alone.
//
// A chunk is a range of query blocks of one sequence; a group is a range of chunks that name the same prefix; a work
// item is one group for one key/value head. It sums the gradient of its prefix over its chunks in a buffer of its own,
// and the buffers of a prefix are added up in a fixed order at the end: the same bits on every machine, whatever the
// number of threads. Long sequences are cut into several chunks when there would be too few work items; their key and
// value gradients are then summed in the same way.
#pragma once

#include "operands.h"
#include "prefix_groups.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

struct Chunk {
  int64_t sequence;
  int64_t first_block, last_block;
  KeyRange keys;        // that these queries see
  int64_t part, parts;  // which chunk of its sequence, of how many
  int64_t partial;      // the row where its partial key gradients begin; -1: they are whole, in scratch or in place
  double cost;
};

struct ChunkGroup {
  int64_t prefix;  // entry of the bank, or -1
  int64_t first_chunk, last_chunk;
  int64_t buffer;  // which buffer of prefix gradients; -1: the only group of its prefix
};

class BackwardSchedule {
 public:
  static constexpr int64_t kTargetItems = 64;
  static constexpr int64_t kQueriesPerChunk = 1024;  // at least: a chunk reads and writes its keys' gradients once more
  static constexpr int64_t kBufferBytes = 64 << 20;  // of prefix gradients, at most

  BackwardSchedule(const AttentionProblem& p, const KeyLists& lists, bool wants_keys, bool wants_prefix,
                   int64_t prefix_bytes)
      : p_(p),
        chunks_memory_(count_chunks(wants_keys) * static_cast<int64_t>(sizeof(Chunk))),
        groups_memory_(num_chunks * static_cast<int64_t>(sizeof(ChunkGroup))) {
    chunks = reinterpret_cast<Chunk*>(chunks_memory_.data());
    groups = reinterpret_cast<ChunkGroup*>(groups_memory_.data());
    fill_chunks(lists, wants_keys);
    group_chunks(wants_prefix, prefix_bytes);
  }

  Chunk* chunks = nullptr;  // ordered by the prefix they name, then by sequence
  ChunkGroup* groups = nullptr;
  int64_t num_chunks = 0, num_groups = 0;
  int64_t num_buffers = 0;   // of prefix gradients, for each key/value head
  int64_t partial_keys = 0;  // of partial key gradients, for each key/value head
  int64_t scratch_keys = 0;  // of key gradients that a worker needs
  int64_t most_keys = 0;     // that a chunk sees

 private:
  int64_t parts_of(const Sequence& s, bool wants_keys) const {
    const int64_t uncut = max<int64_t>(1, p_.num_sequences * p_.num_kv_heads);
    const int64_t blocks_per_chunk = wants_keys ? kQueriesPerChunk / kBlockM : 2;
    return max<int64_t>(1, min(ceil_div(kTargetItems / 2, uncut), num_query_blocks(p_, s) / blocks_per_chunk));
  }

  int64_t count_chunks(bool wants_keys) {
    num_chunks = 0;
    for (int64_t i = 0; i < p_.num_sequences; ++i) num_chunks += parts_of(p_.sequences[i], wants_keys);
    return num_chunks;
  }

  void fill_chunks(const KeyLists& lists, bool wants_keys) {
    const PrefixGroups sequences(p_);
    Chunk* next = chunks;
    for (int64_t prefix = -1; prefix < sequences.num_prefixes(); ++prefix)
      for (const int64_t* i = sequences.begin(prefix); i != sequences.end(prefix); ++i) {
        const int64_t parts = parts_of(p_.sequences[*i], wants_keys);
        for (int64_t part = 0; part < parts; ++part) *next++ = make_chunk(lists[*i], *i, part, parts, wants_keys);
      }
  }

  Chunk make_chunk(const KeyList& list, int64_t sequence, int64_t part, int64_t parts, bool wants_keys) {
    const Sequence& s = p_.sequences[sequence];
    const int64_t group = group_size(p_), blocks = num_query_blocks(p_, s);
    Chunk chunk{sequence, blocks * part / parts, blocks * (part + 1) / parts, {0, 0}, part, parts, -1, 0};
    const int64_t first_query = chunk.first_block * kBlockM;
    const int64_t last_query = min(chunk.last_block * kBlockM, s.query_length * group) - 1;
    if (last_query >= first_query) chunk.keys = visible_keys(p_, s, list, first_query / group, last_query / group);
    const int64_t keys = chunk.keys.size();
    chunk.cost = static_cast<double>(last_query - first_query + 1) * static_cast<double>(keys + s.prefix_length) + 1;
    most_keys = max(most_keys, keys);
    if (parts > 1 && wants_keys) {
      chunk.partial = partial_keys;
      partial_keys += keys;
    } else {
      scratch_keys = max(scratch_keys, keys);
    }
    return chunk;
  }

  void group_chunks(bool wants_prefix, int64_t prefix_bytes) {
    double total = 0;
    for (int64_t i = 0; i < num_chunks; ++i) total += chunks[i].cost;
    const int64_t heads = p_.num_kv_heads;
    double aim = static_cast<double>(ceil_div(kTargetItems, heads));
    if (prefix_bytes > 0) aim = min(aim, static_cast<double>(kBufferBytes) / static_cast<double>(prefix_bytes * heads));
    for (int64_t first = 0, last; first < num_chunks; first = last) {
      const int64_t prefix = prefix_of(p_.sequences[chunks[first].sequence]);
      double cost = 0;
      for (last = first; last < num_chunks && prefix_of(p_.sequences[chunks[last].sequence]) == prefix; ++last)
        cost += chunks[last].cost;
      int64_t count = last - first;
      if (prefix >= 0 && wants_prefix)
        count = max<int64_t>(1, min(count, static_cast<int64_t>(aim * cost / total + 0.5)));
      double done = 0;
      for (int64_t i = first, n = -1; i < last; ++i) {
        // The group that the middle of this chunk's cost falls into.
        const auto group = count == last - first
                               ? i - first
                               : static_cast<int64_t>((done + chunks[i].cost / 2) / cost * static_cast<double>(count));
        done += chunks[i].cost;
        if (group != n) {
          const bool alone = !wants_prefix || prefix < 0 || count == 1;
          groups[num_groups++] = {prefix, i, i, alone ? -1 : num_buffers++};
          n = group;
        }
        groups[num_groups - 1].last_chunk = i + 1;
      }
    }
  }

  const AttentionProblem& p_;
  Buffer chunks_memory_, groups_memory_;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
