// Forward: an online softmax over tiles of keys, first the prefix's, then the sequence's.
//
// For each block of query rows the running maximum m, denominator l (both per lane) and output O (a row a lane)
// absorb one tile after another (Milakov & Gimelshein 2018; Dao et al. 2022):
//   m' = max(m, scores),  p = 2^(scores - m'),  l' = l 2^(m - m') + sum p,  O' = O 2^(m - m') + V^T p.
// The prefix is nothing but more keys: one pass, one softmax, no copy of it per row of the batch.
#pragma once

#include "../tiles/arithmetic.h"
#include "../tiles/microkernel.h"
#include "../tiles/packed_tiles.h"
#include "prefix_groups.h"
#include "scores.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// Below every score, yet finite: differences with it are defined.
constexpr float kLowest = -1e30f;

template <class Arithmetic>
struct ForwardScratch {
  using Element = typename Arithmetic::Element;
  int64_t key_width, value_width;            // head sizes rounded up to whole vectors of numbers
  int64_t key_steps, value_steps;            // and of elements
  Element* rows;                             // [kLanes, key_steps]
  Element* query;                            // [key_steps, kLaneStride] transposed
  Element* value_rows;                       // [kKeys, value_steps], if columns are made of them
  KeptTiles<Element> prefix_keys, keys;      // rows
  KeptTiles<Element> prefix_values, values;  // columns
  float *scores, *mask;                      // [kKeys, kLaneStride]
  float* out;                                // [kLanes, value_width]
  float *maximum, *denominator;              // [kLanes]
  TileRows<Element> k, v;                    // the tile at hand: rows of keys, columns of values
  TilePlan plan;
  Ahead ahead;

  // `kept_prefix`, `kept_keys`: how many of each are kept for the next block.
  ForwardScratch(const AttentionProblem& p, int64_t kept_prefix, int64_t kept_keys, Carver& carve)
      : key_width(round_up(p.head_dim, kWidth)),
        value_width(round_up(p.value_dim, kWidth)),
        key_steps(steps<Arithmetic>(p.head_dim)),
        value_steps(steps<Arithmetic>(p.value_dim)),
        prefix_keys(rows_to_keep(p, kept_prefix, carve)),
        keys(rows_to_keep(p, kept_keys, carve)),
        prefix_values(columns_to_keep(p, kept_prefix, carve)),
        values(columns_to_keep(p, kept_keys, carve)) {
    rows = carve.take<Element>(kLanes * key_steps);
    query = carve.take<Element>(key_steps * kLaneStride);
    value_rows = carve.take<Element>(Arithmetic::kPack > 1 ? kKeys * value_steps : 0);
    scores = carve.take<float>(kKeys * kLaneStride);
    mask = carve.take<float>(p.mask.kind == Mask::Kind::none ? 0 : kKeys * kLaneStride);
    out = carve.take<float>(kLanes * value_width);
    maximum = carve.take<float>(kLanes);
    denominator = carve.take<float>(kLanes);
  }

 private:
  static constexpr int64_t kPack = Arithmetic::kPack;
  KeptTiles<Element> rows_to_keep(const AttentionProblem& p, int64_t count, Carver& carve) const {
    return {count, key_steps, ceil_div(p.head_dim, kPack), 1, carve};
  }
  KeptTiles<Element> columns_to_keep(const AttentionProblem& p, int64_t count, Carver& carve) const {
    return {count, value_width, p.value_dim, kPack, carve};
  }
};

// `sinks` may be null: parts of a softmax that is merged later leave the sink to the merge.
template <class Arithmetic>
static void begin_block(ForwardScratch<Arithmetic>& w, const AttentionProblem& p, const QueryBlock& block,
                        const float* sinks) {
  const auto rows = load_rows<Arithmetic>(w.rows, w.key_steps, p.query, block, p.head_dim);
  transpose_query<Arithmetic>(w.query, rows, w.key_steps, p, block.lanes);
  for (int i = 0; i < kLanes; ++i) {
    // A sink is a key without a value: it only opens the denominator.
    const float sink = sinks != nullptr && i < block.rows ? sinks[block.row[i].head] * kLog2e : -kInfinity;
    w.maximum[i] = max(sink, kLowest);
    w.denominator[i] = sink >= kLowest ? 1.0f : 0.0f;
  }
}

// Output rows [begin, end).
template <class Arithmetic>
static void zero_rows(ForwardScratch<Arithmetic>& w, int64_t begin, int64_t end) {
  for (int64_t i = begin * w.value_width; i < end * w.value_width; i += kWidth) store(w.out + i, Vec{});
}

// Multiplies row i of kWidth rows by factor[i].
static void scale_rows(float* rows, int64_t width, Vec factor) {
  alignas(64) float each[kWidth];
  store(each, factor);
  for (int i = 0; i < kWidth; ++i)
    for (int64_t d = 0; d < width; d += kWidth) store(rows + i * width + d, load(rows + i * width + d) * each[i]);
}

// The greatest of each lane's scores: four at a time, for each takes longer than the next can wait.
PREFIXCORE_INLINE Vec highest_score(const float* scores, const Rectangle& keys) {
  constexpr int kChains = 4;
  Vec highest[kChains];
  for (int n = 0; n < kChains; ++n) highest[n] = splat(-kInfinity);
  int i = keys.first;
  for (; i + kChains <= keys.last; i += kChains)
    for (int n = 0; n < kChains; ++n) highest[n] = max(load(scores + (i + n) * kLaneStride), highest[n]);
  for (; i < keys.last; ++i) highest[0] = max(load(scores + i * kLaneStride), highest[0]);
  return max(max(highest[0], highest[1]), max(highest[2], highest[3]));
}

// The online softmax of kWidth lanes: `keys.first` to `keys.last` turn from scores into probabilities, as columns.
template <class Arithmetic>
PREFIXCORE_INLINE void absorb_scores(ForwardScratch<Arithmetic>& w, const Rectangle& keys, int lane, float factor,
                                     bool first) {
  constexpr int kPack = Arithmetic::kPack;
  float* scores = w.scores + lane;
  const Vec before = load(w.maximum + lane);
  Vec after = max(Arithmetic::scaled(highest_score(scores, keys), factor), before);
  Vec total = load(w.denominator + lane);
  if (!any(after > before + Arithmetic::kSlack)) {
    after = before;
  } else {
    const Vec shrink = exp2(before - after);
    total *= shrink;
    if (!first) scale_rows(w.out + lane * w.value_width, w.value_width, shrink);
    store(w.maximum + lane, after);
  }
  const int end = keys.first + kPack * static_cast<int>(depth<Arithmetic>(keys.last - keys.first));
#pragma GCC unroll 4
  for (int i = keys.first; i < end; i += kPack) {
    Vec probability[kPack];
    for (int n = 0; n < kPack; ++n) {
      probability[n] = i + n < keys.last
                           ? Arithmetic::exp2(Arithmetic::scaled(load(scores + (i + n) * kLaneStride), factor) - after)
                           : Vec{};
      total += probability[n];
    }
    Arithmetic::store_columns(reinterpret_cast<typename Arithmetic::Element*>(scores + i * kLaneStride),
                              Arithmetic::round(probability));
  }
  store(w.denominator + lane, total);
}

// Absorbs the tile w.k, w.v. `first`: nothing has been absorbed before, and the output holds no numbers yet.
template <class Arithmetic>
static void absorb_tile(ForwardScratch<Arithmetic>& w, const AttentionProblem& p, int lanes, const float* mask,
                        bool first) {
  constexpr int kPack = Arithmetic::kPack;
  using Element = typename Arithmetic::Element;
  const TilePlan& plan = w.plan;
  for (int n = 0; n < plan.num_runs; ++n) {
    const Rectangle& run = plan.run[n];
    multiply<Arithmetic, ALayout::rows>(run.last - run.first, run.end - run.begin, depth<Arithmetic>(p.head_dim),
                                        w.k.data + run.first * w.k.stride, w.k.stride, w.query + run.begin, kLaneStride,
                                        w.scores + run.first * kLaneStride + run.begin, kLaneStride, false, w.ahead);
  }
  const float factor = finish_scores<Arithmetic>(p, plan, w.scores, nullptr, mask);

  int lane = 0;
  for (int n = 0; n < plan.num_strips; ++n) {
    const Rectangle& strip = plan.strip[n];
    for (int l = strip.begin; l < strip.end; l += kWidth) absorb_scores(w, strip, l, factor, first);
    if (first) zero_rows(w, lane, strip.begin);
    multiply<Arithmetic, ALayout::columns>(
        strip.end - strip.begin, w.value_width, depth<Arithmetic>(strip.last - strip.first),
        reinterpret_cast<const Element*>(w.scores + strip.first * kLaneStride + strip.begin), kPack * kLaneStride,
        w.v.data + strip.first / kPack * w.v.stride, w.v.stride, w.out + strip.begin * w.value_width, w.value_width,
        !first, w.ahead);
    lane = strip.end;
  }
  if (first) zero_rows(w, lane, lanes);
}

// Fills w.k and w.v with the keys and values of `keys` slots, of which the first is number `first` in `rows` and
// `columns`.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static void load_tile(ForwardScratch<Arithmetic>& w, const AttentionProblem& p, const ConstView& key,
                      const ConstView& value, int64_t batch, int64_t head, int64_t start, const KeyList& list,
                      int64_t slot, int keys, KeptTiles<Element>& rows, KeptTiles<Element>& columns, int64_t first) {
  w.k = rows.of(first, keys, [&](Element* room) {
    return Arithmetic::key_rows(room, w.key_steps, key, batch, head, start, list, slot, keys, p.head_dim);
  });
  w.v = columns.of(first, keys, [&](Element* room) {
    Element* rows_room = Arithmetic::kPack > 1 ? w.value_rows : room;
    const auto tile =
        Arithmetic::key_rows(rows_room, w.value_steps, value, batch, head, start, list, slot, keys, p.value_dim);
    return Arithmetic::columns(room, w.value_width, tile, keys);
  });
}

// Absorbs slots [range) of a prefix, first of all tiles.
template <class Arithmetic>
static void absorb_prefix(ForwardScratch<Arithmetic>& w, const AttentionProblem& p, int64_t prefix, int64_t kv_head,
                          const KeyList& list, SlotRange range, int lanes) {
  for (int64_t slot = range.begin; slot < range.end; slot += kKeys) {
    const int keys = static_cast<int>(min<int64_t>(kKeys, range.end - slot));
    load_tile(w, p, p.prefix_key, p.prefix_value, prefix, kv_head, 0, list, slot, keys, w.prefix_keys, w.prefix_values,
              slot - range.begin);
    const int64_t next = slot + keys, end = min(next + kKeys, range.end);
    w.ahead.add_keys(p.prefix_key, prefix, kv_head, next, end, p.head_dim);
    w.ahead.add_keys(p.prefix_value, prefix, kv_head, next, end, p.value_dim);
    plan_whole(w.plan, keys, lanes);
    absorb_tile(w, p, lanes, nullptr, slot == range.begin);
  }
}

// Absorbs slots [range) of a sequence's own keys, `first` of all tiles or not. Calls ask(slot) for each tile before its
// products, which then ask for whatever that added.
template <class Arithmetic, class Ask>
static void absorb_sequence(ForwardScratch<Arithmetic>& w, const AttentionProblem& p, const QueryBlock& block,
                            const Sequence& s, int64_t kv_head, const KeyList& list, SlotRange range, int64_t first_row,
                            bool first, Ask ask) {
  for (int64_t slot = range.begin; slot < range.end; slot += kKeys, first = false) {
    const int keys = static_cast<int>(min<int64_t>(kKeys, range.end - slot));
    load_tile(w, p, p.key, p.value, s.batch, kv_head, s.key_start, list, slot, keys, w.keys, w.values,
              slot - range.begin);
    ask(slot);
    plan_sequence<Arithmetic>(w.plan, p, s, list, slot, keys, first_row, block.lanes);
    const bool masked = p.mask.kind != Mask::Kind::none;
    if (masked) fill_mask(w.mask, block, p.mask, s.key_start, list, slot, keys);
    absorb_tile(w, p, block.lanes, masked ? w.mask : nullptr, first);
  }
  if (first) zero_rows(w, 0, block.lanes);
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
  store_rows(p.out, block, w.out, w.value_width, p.value_dim, w.denominator);
  if (p.lse != nullptr)
    for (int i = 0; i < block.rows; ++i) {
      const Row& r = block.row[i];
      p.lse[r.batch * p.lse_stride[0] + r.head * p.lse_stride[1] + r.token] = lse[i];
    }
}

struct ForwardUnit {
  const Sequence* sequence = nullptr;
  const KeyList* keys = nullptr;
  int64_t kv_head = 0, first_row = 0;
  SlotRange range{0, 0};  // the keys it sees

  // Whether it sees the same keys as `before`, or the same prefix.
  bool shares_keys(const ForwardUnit& before) const { return before.sequence == sequence && before.kv_head == kv_head; }
  bool shares_prefix(const ForwardUnit& before) const {
    return before.sequence != nullptr && before.kv_head == kv_head && before.sequence->prefix == sequence->prefix;
  }

  // Whether its keys are near after `before`: the same head's, and few enough for a core's cache.
  bool follows(const ForwardUnit& before, const AttentionProblem& p) const {
    return shares_keys(before) && (range.end - range.begin) * (p.head_dim + p.value_dim) <= kNear;
  }
};

template <class Arithmetic>
static void forward_block(const AttentionForward& p, const ForwardUnit& unit, const ForwardUnit& previous,
                          const ForwardUnit& next, ForwardScratch<Arithmetic>& w) {
  const Sequence& s = *unit.sequence;
  const KeyList& list = *unit.keys;
  const int64_t kv_head = unit.kv_head, first_row = unit.first_row;
  const SlotRange range = unit.range;
  QueryBlock block;
  fill_block<Arithmetic>(block, p, s, kv_head, first_row);
  begin_block(w, p, block, p.sinks);

  const KeyList prefix{nullptr, prefix_of(s) >= 0 ? s.prefix_length : 0};
  for (auto* tiles : {&w.prefix_keys, &w.prefix_values}) tiles->begin(unit.shares_prefix(previous));
  for (auto* tiles : {&w.keys, &w.values}) tiles->begin(unit.shares_keys(previous));
  absorb_prefix(w, p, s.prefix, kv_head, prefix, {0, prefix.count}, block.lanes);
  absorb_sequence(w, p, block, s, kv_head, list, range, first_row, prefix.count == 0, [&](int64_t slot) {
    const int64_t after = slot + kKeys;
    if (!unit.follows(previous, p))
      ask_for_tile(w.ahead, w.keys, w.values, p, s, list, kv_head, after, range.end, after - range.begin);
    if (after < range.end) return;
    w.ahead.add_block(p.out, p, s, kv_head, first_row, p.value_dim);
    if (next.sequence == nullptr) return;
    w.ahead.add_block(p.query, p, *next.sequence, next.kv_head, next.first_row, p.head_dim);
    if (!next.follows(unit, p))
      ask_for_keys(w.ahead, p, *next.sequence, *next.keys, next.kv_head, next.range.begin, next.range.end);
  });
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

  // A sequence of one block leaves no keys to the next.
  int64_t longest = 0, most_blocks = 0;
  for (int64_t i = 0; i < p.num_sequences; ++i) {
    longest = max(longest, lists[i].count);
    most_blocks = max(most_blocks, blocks_of(i));
  }
  const int64_t keys = most_blocks > 1 ? keys_to_keep(p, longest) : 0, prefix = keys_to_keep(p, p.prefix_capacity);
  Carver measure;
  ForwardScratch<Arithmetic>(p, prefix, keys, measure);
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
  auto work = [&](const Turn& turn, char* memory) {
    Carver carve(memory);
    ForwardScratch<Arithmetic> scratch(p, prefix, keys, carve);
    auto maybe_at = [&](int64_t unit) { return unit >= 0 ? unit_at(unit) : ForwardUnit{}; };
    forward_block(p, unit_at(turn.unit), maybe_at(turn.previous), maybe_at(turn.next), scratch);
  };
  for_each_unit<typename Arithmetic::Registers>(parallel, start[p.num_sequences], measure.used(), work);
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
