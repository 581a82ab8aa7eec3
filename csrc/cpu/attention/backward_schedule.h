// How the backward pass is cut into units of work, from the shape alone.
//
// An item is a stretch of query blocks of one sequence; a slot is a row of items that name the same
// prefix; a unit is one slot for one key/value head. A unit sums the gradient of its prefix over its
// items in a buffer of its own, and the buffers of a prefix are added up in a fixed order at the end:
// the same bits on every machine, whatever the number of threads. Long sequences are cut into several
// items when there would be too few units; their key and value gradients are then summed in the same
// way.
#pragma once

#include "../tiles/query_block.h"
#include "prefix_groups.h"
#include "visible_keys.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

struct Item {
  int64_t sequence;
  int64_t first_block, last_block;
  SlotRange keys;       // that these queries see
  int64_t part, parts;  // which piece of the sequence, of how many
  int64_t partial;  // where its part of the key gradients lies, in rows; -1: whole, in the worker's scratch or in place
  double cost;
};

struct Slot {
  int64_t prefix;  // entry of the bank, or -1
  int64_t first_item, last_item;
  int64_t buffer;  // which buffer of prefix gradients; -1: the only slot of its prefix
};

class BackwardSchedule {
 public:
  static constexpr int64_t kUnits = 64;          // aimed at
  static constexpr int64_t kRowsPerPart = 1024;  // a part costs its keys' gradients once more
  static constexpr int64_t kBufferBytes = 64 << 20;

  BackwardSchedule(const AttentionProblem& p, const KeyLists& lists, bool wants_keys, bool wants_prefix,
                   int64_t prefix_bytes)
      : problem_(p),
        items_memory_(count_items(wants_keys) * static_cast<int64_t>(sizeof(Item))),
        slots_memory_(num_items * static_cast<int64_t>(sizeof(Slot))) {
    items = reinterpret_cast<Item*>(items_memory_.data());
    slots = reinterpret_cast<Slot*>(slots_memory_.data());
    fill_items(lists, wants_keys);
    fill_slots(wants_prefix, prefix_bytes);
  }

  Item* items = nullptr;  // ordered by the prefix they name, then by sequence
  Slot* slots = nullptr;
  int64_t num_items = 0, num_slots = 0;
  int64_t num_buffers = 0;   // of prefix gradients, for each key/value head
  int64_t partial_rows = 0;  // of partial key gradients, for each key/value head
  int64_t scratch_rows = 0;  // of key gradients that a worker needs
  int64_t most_keys = 0;     // of an item

 private:
  int64_t blocks_of(const Sequence& s) const {
    return ceil_div(s.query_length * (problem_.num_heads / problem_.num_kv_heads), kLanes);
  }

  int64_t parts_of(const Sequence& s, bool wants_keys) const {
    const int64_t units = max<int64_t>(1, problem_.num_sequences * problem_.num_kv_heads);
    const int64_t blocks_per_part = wants_keys ? kRowsPerPart / kLanes : 2;
    return max<int64_t>(1, min(ceil_div(kUnits / 2, units), blocks_of(s) / blocks_per_part));
  }

  int64_t count_items(bool wants_keys) {
    num_items = 0;
    for (int64_t i = 0; i < problem_.num_sequences; ++i) num_items += parts_of(problem_.sequences[i], wants_keys);
    return num_items;
  }

  void fill_items(const KeyLists& lists, bool wants_keys) {
    const PrefixGroups groups(problem_);
    Item* next = items;
    for (int64_t prefix = -1; prefix < groups.num_prefixes(); ++prefix)
      for (const int64_t* i = groups.begin(prefix); i != groups.end(prefix); ++i) {
        const int64_t parts = parts_of(problem_.sequences[*i], wants_keys);
        for (int64_t part = 0; part < parts; ++part) *next++ = make_item(lists[*i], *i, part, parts, wants_keys);
      }
  }

  Item make_item(const KeyList& list, int64_t sequence, int64_t part, int64_t parts, bool wants_keys) {
    const Sequence& s = problem_.sequences[sequence];
    const int64_t group = problem_.num_heads / problem_.num_kv_heads, blocks = blocks_of(s);
    Item item{sequence, blocks * part / parts, blocks * (part + 1) / parts, {0, 0}, part, parts, -1, 0};
    const int64_t first_row = item.first_block * kLanes;
    const int64_t last_row = min(item.last_block * kLanes, s.query_length * group) - 1;
    if (last_row >= first_row) item.keys = visible_slots(problem_, s, list, first_row / group, last_row / group);
    const int64_t keys = item.keys.end - item.keys.begin;
    item.cost = static_cast<double>(last_row - first_row + 1) * static_cast<double>(keys + s.prefix_length) + 1;
    most_keys = max(most_keys, keys);
    if (parts > 1 && wants_keys) {
      item.partial = partial_rows;
      partial_rows += keys;
    } else {
      scratch_rows = max(scratch_rows, keys);
    }
    return item;
  }

  void fill_slots(bool wants_prefix, int64_t prefix_bytes) {
    double total = 0;
    for (int64_t i = 0; i < num_items; ++i) total += items[i].cost;
    const int64_t heads = problem_.num_kv_heads;
    double aim = static_cast<double>(ceil_div(kUnits, heads));
    if (prefix_bytes > 0) aim = min(aim, static_cast<double>(kBufferBytes) / static_cast<double>(prefix_bytes * heads));
    for (int64_t first = 0, last; first < num_items; first = last) {
      const int64_t prefix = prefix_of(problem_.sequences[items[first].sequence]);
      double cost = 0;
      for (last = first; last < num_items && prefix_of(problem_.sequences[items[last].sequence]) == prefix; ++last)
        cost += items[last].cost;
      int64_t count = last - first;
      if (prefix >= 0 && wants_prefix)
        count = max<int64_t>(1, min(count, static_cast<int64_t>(aim * cost / total + 0.5)));
      double done = 0;
      for (int64_t i = first, n = -1; i < last; ++i) {
        // The slot that the middle of this item's cost falls into.
        const auto slot = count == last - first
                              ? i - first
                              : static_cast<int64_t>((done + items[i].cost / 2) / cost * static_cast<double>(count));
        done += items[i].cost;
        if (slot != n) {
          const bool alone = !wants_prefix || prefix < 0 || count == 1;
          slots[num_slots++] = {prefix, i, i, alone ? -1 : num_buffers++};
          n = slot;
        }
        slots[num_slots - 1].last_item = i + 1;
      }
    }
  }

  const AttentionProblem& problem_;
  Buffer items_memory_, slots_memory_;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
