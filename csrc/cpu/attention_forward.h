// Forward: an online softmax over tiles of keys, first the prefix's, then the sequence's.
//
// For each block of query rows the running maximum m, denominator l and output O (all per lane, O
// transposed) absorb one tile after another (Milakov & Gimelshein 2018; Dao et al. 2022):
//   m' = max(m, scores),  p = 2^(scores - m'),  l' = l 2^(m - m') + sum p,  O' = O 2^(m - m') + V^T p.
// The prefix is nothing but more keys: one pass, one softmax, no copy of it per row of the batch.
#pragma once

#include "bfloat16_pairs.h"
#include "float32.h"
#include "microkernel.h"
#include "prefix_groups.h"
#include "scores.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// Below every score, yet finite: differences with it are defined.
constexpr float kLowest = -1e30f;

template <class Arithmetic>
struct ForwardScratch {
  using Element = typename Arithmetic::Element;
  int64_t key_width, value_width;  // head sizes rounded up to whole vectors of numbers
  int64_t key_steps, value_steps;  // and of elements
  float* rows;                     // [kLanes, wider of the two]
  Element* query;                  // [key_steps, kLaneStride] transposed
  Element *key, *value;            // room for a packed tile: [kKeys, key_steps], [kKeys, value_steps]
  Element* value_columns;          // room for its columns: [kKeys / kPack, value_width]
  float *scores, *mask;            // [kKeys, kLaneStride]
  float* out;                      // [value_width, kLaneStride] transposed
  float *maximum, *denominator;    // [kLanes]
  TileRows<Element> k, v;          // the tile at hand: rows of keys, columns of values
  TilePlan plan;
  Ahead ahead;

  ForwardScratch(const AttentionProblem& p, Carver& carve)
      : key_width(round_up(p.head_dim, kWidth)),
        value_width(round_up(p.value_dim, kWidth)),
        key_steps(steps<Arithmetic>(p.head_dim)),
        value_steps(steps<Arithmetic>(p.value_dim)) {
    rows = carve.take<float>(kLanes * max(key_width, value_width));
    query = carve.take<Element>(key_steps * kLaneStride);
    key = carve.take<Element>(kKeys * key_steps);
    value = carve.take<Element>(kKeys * value_steps);
    value_columns = carve.take<Element>(Arithmetic::kPack > 1 ? kKeys / Arithmetic::kPack * value_width : 0);
    scores = carve.take<float>(kKeys * kLaneStride);
    mask = carve.take<float>(p.mask.kind == Mask::Kind::none ? 0 : kKeys * kLaneStride);
    out = carve.take<float>(value_width * kLaneStride);
    maximum = carve.take<float>(kLanes);
    denominator = carve.take<float>(kLanes);
  }
};

// `sinks` may be null: parts of a softmax that is merged later leave the sink to the merge.
template <class Arithmetic>
static void begin_block(ForwardScratch<Arithmetic>& w, const AttentionProblem& p, const QueryBlock& block,
                        const float* sinks) {
  auto* rows = reinterpret_cast<typename Arithmetic::Element*>(w.rows);
  load_rows<Arithmetic>(rows, w.key_steps, p.query, block, p.head_dim);
  transpose_query<Arithmetic>(w.query, rows, w.key_steps, p, block.lanes);
  for (int64_t i = 0; i < w.value_width * kLaneStride; i += kWidth) store(w.out + i, Vec{});
  for (int i = 0; i < kLanes; ++i) {
    // A sink is a key without a value: it only opens the denominator.
    const float sink = sinks != nullptr && i < block.rows ? sinks[block.row[i].head] * kLog2e : -kInfinity;
    w.maximum[i] = max(sink, kLowest);
    w.denominator[i] = sink >= kLowest ? 1.0f : 0.0f;
  }
}

// Absorbs the tile w.k, w.v. `first`: the output is still all zeros.
template <class Arithmetic>
static void absorb_tile(ForwardScratch<Arithmetic>& w, const AttentionProblem& p, int lanes, const float* mask,
                        bool first) {
  constexpr int kPack = Arithmetic::kPack;
  const TilePlan& plan = w.plan;
  for (int n = 0; n < plan.num_runs; ++n) {
    const Run& run = plan.run[n];
    multiply<Arithmetic, ALayout::rows>(run.last - run.first, run.end - run.begin, ceil_div(p.head_dim, kPack),
                                        w.k.data + run.first * w.k.stride, w.k.stride, w.query + run.begin, kLaneStride,
                                        w.scores + run.first * kLaneStride + run.begin, kLaneStride, false, w.ahead);
  }
  const float factor = finish_scores<Arithmetic>(p, plan, w.scores, nullptr, mask);

  for (int l = 0; l < lanes; l += kWidth) {
    const Vec before = load(w.maximum + l);
    Vec highest = splat(-kInfinity);
    for (int n = 0; n < plan.num_runs; ++n) {
      const Run& run = plan.run[n];
      if (l < run.begin || l >= run.end) continue;
#pragma GCC unroll 4
      for (int i = run.first; i < run.last; ++i) highest = max(load(w.scores + i * kLaneStride + l), highest);
    }
    Vec after = max(Arithmetic::scaled(highest, factor), before);
    Vec total = load(w.denominator + l);
    if (!any(after > before + Arithmetic::kSlack)) {
      after = before;
    } else {
      const Vec shrink = exp2(before - after);
      total *= shrink;
      if (!first)
        for (int64_t d = 0; d < p.value_dim; ++d)
          store(w.out + d * kLaneStride + l, load(w.out + d * kLaneStride + l) * shrink);
      store(w.maximum + l, after);
    }
    for (int n = 0; n < plan.num_runs; ++n) {
      const Run& run = plan.run[n];
      if (l < run.begin || l >= run.end) continue;
      for (int i = run.first; i < run.last; i += kPack) {
        float* scores = w.scores + i * kLaneStride + l;
        Vec probability[kPack];
        for (int n = 0; n < kPack; ++n) {
          probability[n] = i + n < run.last
                               ? Arithmetic::exp2(Arithmetic::scaled(load(scores + n * kLaneStride), factor) - after)
                               : Vec{};
          total += probability[n];
        }
        // Probabilities take the place of their scores, as columns.
        Arithmetic::store_columns(reinterpret_cast<typename Arithmetic::Element*>(scores),
                                  Arithmetic::round(probability));
      }
    }
    store(w.denominator + l, total);
  }

  for (int n = 0; n < plan.num_runs; ++n) {
    const Run& run = plan.run[n];
    const auto* probability =
        reinterpret_cast<const typename Arithmetic::Element*>(w.scores + run.first * kLaneStride + run.begin);
    multiply<Arithmetic, ALayout::columns>(p.value_dim, run.end - run.begin, ceil_div(run.last - run.first, kPack),
                                           w.v.data + run.first / kPack * w.v.stride, w.v.stride, probability,
                                           kPack * kLaneStride, w.out + run.begin, kLaneStride, true, w.ahead);
  }
}

// Fills w.k and w.v with the keys and values of `keys` slots.
template <class Arithmetic>
static void load_tile(ForwardScratch<Arithmetic>& w, const AttentionProblem& p, const ConstView& key,
                      const ConstView& value, int64_t batch, int64_t head, int64_t start, const KeyList& list,
                      int64_t slot, int keys) {
  w.k = Arithmetic::key_rows(w.key, w.key_steps, key, batch, head, start, list, slot, keys, p.head_dim);
  w.v = Arithmetic::key_rows(w.value, w.value_steps, value, batch, head, start, list, slot, keys, p.value_dim);
  w.v = Arithmetic::columns(w.value_columns, w.value_width, w.v, keys);
}

// Absorbs slots [range) of a prefix, first of all tiles: the output is still all zeros.
template <class Arithmetic>
static void absorb_prefix(ForwardScratch<Arithmetic>& w, const AttentionProblem& p, int64_t prefix, int64_t kv_head,
                          const KeyList& list, SlotRange range, int lanes) {
  for (int64_t slot = range.begin; slot < range.end; slot += kKeys) {
    const int keys = static_cast<int>(min<int64_t>(kKeys, range.end - slot));
    load_tile(w, p, p.prefix_key, p.prefix_value, prefix, kv_head, 0, list, slot, keys);
    const int64_t next = slot + keys, end = min(next + kKeys, range.end);
    w.ahead.add_keys(p.prefix_key, prefix, kv_head, next, end, p.head_dim);
    w.ahead.add_keys(p.prefix_value, prefix, kv_head, next, end, p.value_dim);
    plan_whole(w.plan, keys, lanes);
    absorb_tile(w, p, lanes, nullptr, slot == range.begin);
  }
}

// Divides by the denominator and writes the block's outputs and log-sum-exps.
template <class Arithmetic>
static void finish_block(ForwardScratch<Arithmetic>& w, const AttentionForward& p, const QueryBlock& block) {
  alignas(64) float lse[kLanes];
  for (int l = 0; l < block.lanes; l += kWidth) {
    const Vec total = load(w.denominator + l);
    const VecInt sees = total > 0.0f;
    store(lse + l, select(sees, (load(w.maximum + l) + log2(total)) * kLn2, splat(-kInfinity)));
    store(w.denominator + l, select(sees, 1.0f / total, Vec{}));
  }
  transpose(w.rows, w.value_width, w.out, kLaneStride, w.value_width, block.lanes, w.denominator);
  store_rows(p.out, block, w.rows, w.value_width, p.value_dim);
  if (p.lse != nullptr)
    for (int i = 0; i < block.rows; ++i) {
      const Row& r = block.row[i];
      p.lse[r.batch * p.lse_stride[0] + r.head * p.lse_stride[1] + r.token] = lse[i];
    }
}

struct ForwardUnit {
  const Sequence* sequence;
  const KeyList* keys;
  int64_t kv_head, first_row;
  SlotRange range;  // the keys it sees
};

template <class Arithmetic>
static void forward_block(const AttentionForward& p, const ForwardUnit& unit, const ForwardUnit* next,
                          ForwardScratch<Arithmetic>& w) {
  const Sequence& s = *unit.sequence;
  const KeyList& list = *unit.keys;
  const int64_t kv_head = unit.kv_head, first_row = unit.first_row;
  const SlotRange range = unit.range;
  QueryBlock block;
  fill_block(block, p, s, kv_head, first_row);
  begin_block(w, p, block, p.sinks);
  w.ahead.add_block(p.out, p, s, kv_head, first_row, p.value_dim);
  ask_for_keys(w.ahead, p, s, list, kv_head, range.begin, range.end);

  const KeyList prefix{nullptr, prefix_of(s) >= 0 ? s.prefix_length : 0};
  absorb_prefix(w, p, s.prefix, kv_head, prefix, {0, prefix.count}, block.lanes);
  bool first = prefix.count == 0;
  for (int64_t slot = range.begin; slot < range.end; slot += kKeys, first = false) {
    const int keys = static_cast<int>(min<int64_t>(kKeys, range.end - slot));
    load_tile(w, p, p.key, p.value, s.batch, kv_head, s.key_start, list, slot, keys);
    ask_for_keys(w.ahead, p, s, list, kv_head, slot + kKeys, range.end);
    if (slot + kKeys >= range.end && next != nullptr) {
      w.ahead.add_block(p.query, p, *next->sequence, next->kv_head, next->first_row, p.head_dim);
      ask_for_keys(w.ahead, p, *next->sequence, *next->keys, next->kv_head, next->range.begin, next->range.end);
    }
    plan_sequence(w.plan, p, s, list, slot, keys, first_row, block.lanes, Arithmetic::kPack);
    const bool masked = p.mask.kind != Mask::Kind::none;
    if (masked) fill_mask(w.mask, block, p.mask, s.key_start, list, slot, keys);
    absorb_tile(w, p, block.lanes, masked ? w.mask : nullptr, first);
  }
  finish_block(w, p, block);
}

// One unit of work: a block of rows of one sequence and one key/value head, later blocks first (with
// causal attention they are the longest).
template <class Arithmetic>
static void forward_pass(const AttentionForward& p, const Parallel& parallel) {
  const KeyLists lists(p);
  const int64_t group = p.num_heads / p.num_kv_heads;
  auto blocks_of = [&](int64_t i) { return ceil_div(p.sequences[i].query_length * group, kLanes); };
  Buffer starts((p.num_sequences + 1) * static_cast<int64_t>(sizeof(int64_t)));
  auto* start = reinterpret_cast<int64_t*>(starts.data());  // first unit of each sequence
  start[0] = 0;
  for (int64_t i = 0; i < p.num_sequences; ++i) start[i + 1] = start[i] + blocks_of(i) * p.num_kv_heads;

  Carver measure;
  ForwardScratch<Arithmetic>(p, measure);
  auto unit_at = [&](int64_t unit) {
    int64_t low = 0, high = p.num_sequences;  // the sequence with start[low] <= unit < start[low + 1]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (start[middle] <= unit ? low : high) = middle;
    }
    const Sequence& s = p.sequences[low];
    const int64_t blocks = blocks_of(low), place = unit - start[low];
    const int64_t first = (blocks - 1 - place % blocks) * kLanes, last = min(first + kLanes, s.query_length * group);
    return ForwardUnit{&s, &lists[low], place / blocks, first,
                       visible_slots(p, s, lists[low], first / group, (last - 1) / group)};
  };
  auto work = [&](int64_t unit, int64_t next, char* memory) {
    Carver carve(memory);
    ForwardScratch<Arithmetic> scratch(p, carve);
    const ForwardUnit after = next >= 0 ? unit_at(next) : ForwardUnit{};
    forward_block(p, unit_at(unit), next >= 0 ? &after : nullptr, scratch);
  };
  for_each_unit(parallel, start[p.num_sequences], measure.used(), work);
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
