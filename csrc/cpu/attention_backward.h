// Backward: one pass, blocks of query rows outside, tiles of keys inside.
//
// With L the log-sum-exp over prefix and sequence together and delta = <dO, O> - dL:
//   P = exp(S - L),  dV = P^T dO,  dS = P * (dO V^T - delta),  dK = scale dS^T Q,  dQ = scale dS K.
// Probabilities are recomputed, so a tile costs five products. dQ of the block stays in the cache
// over all tiles; dK and dV of the whole sequence (and of the prefix) collect in float32.
#pragma once

#include "backward_schedule.h"
#include "bfloat16_pairs.h"
#include "float32.h"
#include "microkernel.h"
#include "scores.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

struct Wanted {
  bool query, keys, prefix;
};

template <class Arithmetic>
struct BackwardScratch {
  using Element = typename Arithmetic::Element;
  int64_t key_width, value_width;     // head sizes rounded up to whole vectors of numbers
  int64_t key_steps, value_steps;     // and of elements
  float *query_room, *grad_out_room;  // [kLanes, key_width], [kLanes, value_width]: rows, and later results
  TileRows<Element> q, grad;          // columns of the block: [lanes / kPack, key_width], ...
  Element *query, *grad_out;          // its rows transposed, [key_steps, kLaneStride], ...
  float* grad_query;                  // [kLanes, key_width]
  Element *key, *value;               // room for a packed tile: [kKeys, key_steps], ...
  Element *query_columns, *grad_out_columns, *key_columns;  // room for what is packed as columns
  float *probability, *grad_score;                          // [kKeys, kLaneStride]
  Element* grad_score_columns;                              // [kKeys / kPack, kLaneStride]
  float *slope, *mask;                                      // [kKeys, kLaneStride] of softcap and mask
  float *lse, *delta;                                       // [kLanes], lse in units of log 2
  float *grad_key, *grad_value;                             // of a sequence that is one item: [keys, key_width], ...
  float *grad_prefix_key, *grad_prefix_value;               // of a prefix that is one slot: [P, key_width], ...
  TileRows<Element> k, v, k_columns;                        // the tile at hand
  TilePlan plan;
  Ahead ahead;

  BackwardScratch(const AttentionProblem& p, const Wanted& wanted, int64_t key_rows, Carver& carve)
      : key_width(round_up(p.head_dim, kWidth)),
        value_width(round_up(p.value_dim, kWidth)),
        key_steps(steps<Arithmetic>(p.head_dim)),
        value_steps(steps<Arithmetic>(p.value_dim)) {
    constexpr int64_t kPack = Arithmetic::kPack;
    query_room = carve.take<float>(kLanes * key_width);
    grad_out_room = carve.take<float>(kLanes * value_width);
    query = carve.take<Element>(key_steps * kLaneStride);
    grad_out = carve.take<Element>(value_steps * kLaneStride);
    grad_query = carve.take<float>(kLanes * key_width);
    key = carve.take<Element>(kKeys * key_steps);
    value = carve.take<Element>(kKeys * value_steps);
    probability = carve.take<float>(kKeys * kLaneStride);
    grad_score = carve.take<float>(kKeys * kLaneStride);
    query_columns = carve.take<Element>(kPack > 1 ? kLanes / kPack * key_width : 0);
    grad_out_columns = carve.take<Element>(kPack > 1 ? kLanes / kPack * value_width : 0);
    key_columns = carve.take<Element>(kPack > 1 ? kKeys / kPack * key_width : 0);
    grad_score_columns = carve.take<Element>(kPack > 1 ? kKeys / kPack * kLaneStride : 0);
    slope = carve.take<float>(p.softcap > 0 ? kKeys * kLaneStride : 0);
    mask = carve.take<float>(p.mask.kind == Mask::Kind::none ? 0 : kKeys * kLaneStride);
    lse = carve.take<float>(kLanes);
    delta = carve.take<float>(kLanes);
    grad_key = carve.take<float>(wanted.keys ? key_rows * key_width : 0);
    grad_value = carve.take<float>(wanted.keys ? key_rows * value_width : 0);
    grad_prefix_key = carve.take<float>(wanted.prefix ? p.prefix_capacity * key_width : 0);
    grad_prefix_value = carve.take<float>(wanted.prefix ? p.prefix_capacity * value_width : 0);
  }
};

static void fill_zero(float* to, int64_t count) {
  if (count > 0) __builtin_memset(to, 0, static_cast<size_t>(count) * sizeof(float));
}

template <class Arithmetic, class Element = typename Arithmetic::Element>
static void begin_block(BackwardScratch<Arithmetic>& w, const AttentionBackward& p, const QueryBlock& block) {
  auto* query_rows = reinterpret_cast<Element*>(w.query_room);
  load_rows<Arithmetic>(query_rows, w.key_steps, p.query, block, p.head_dim);
  transpose_query<Arithmetic>(w.query, query_rows, w.key_steps, p, block.lanes);
  w.q = Arithmetic::columns(w.query_columns, w.key_width, {query_rows, w.key_steps}, block.lanes);

  auto* grad_out_rows = reinterpret_cast<Element*>(w.grad_out_room);
  load_rows<Arithmetic>(grad_out_rows, w.value_steps, p.grad_out, block, p.value_dim);
  load_rows<Arithmetic>(w.grad_out, w.value_steps, p.out, block, p.value_dim);  // the output, for delta alone
  row_dots<Arithmetic>(w.delta, w.grad_out, grad_out_rows, w.value_steps, block.lanes);
  transpose(reinterpret_cast<float*>(w.grad_out), kLaneStride, w.grad_out_room, w.value_steps, block.lanes,
            w.value_steps, nullptr);
  w.grad = Arithmetic::columns(w.grad_out_columns, w.value_width, {grad_out_rows, w.value_steps}, block.lanes);
  fill_zero(w.grad_query, block.lanes * w.key_width);
  for (int i = 0; i < kLanes; ++i) {
    w.lse[i] = kInfinity;  // makes every probability 0: lanes without a row, rows that see nothing
    if (i >= block.rows) continue;
    const Row& r = block.row[i];
    const int64_t place = r.batch * p.lse_stride[0] + r.head * p.lse_stride[1] + r.token;
    if (p.lse[place] > -kInfinity) w.lse[i] = p.lse[place] * kLog2e;
    if (p.grad_lse != nullptr) w.delta[i] -= p.grad_lse[place];
  }
}

// The tile w.k, w.v. Gradients are added to grad_query in w and, if not null, to
// grad_key [keys, key_width] and grad_value [keys, value_width], all still without `scale`.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static void backward_tile(BackwardScratch<Arithmetic>& w, const AttentionBackward& p, bool wants_query,
                          const float* mask, float* grad_key, float* grad_value) {
  constexpr int kPack = Arithmetic::kPack;
  const TilePlan& plan = w.plan;
  for (int n = 0; n < plan.num_runs; ++n) {
    const Rectangle& run = plan.run[n];
    const int64_t keys = run.last - run.first, lanes = run.end - run.begin;
    const int64_t place = run.first * kLaneStride + run.begin;
    multiply<Arithmetic, ALayout::rows>(keys, lanes, ceil_div(p.head_dim, kPack), w.k.data + run.first * w.k.stride,
                                        w.k.stride, w.query + run.begin, kLaneStride, w.probability + place,
                                        kLaneStride, false, w.ahead);
    multiply<Arithmetic, ALayout::rows>(keys, lanes, ceil_div(p.value_dim, kPack), w.v.data + run.first * w.v.stride,
                                        w.v.stride, w.grad_out + run.begin, kLaneStride, w.grad_score + place,
                                        kLaneStride, false, w.ahead);
  }
  const bool capped = p.softcap > 0;
  const float factor = finish_scores<Arithmetic>(p, plan, w.probability, w.slope, mask);

  // Probabilities and gradients take the place of what they come from, as rows; with pairs a row takes half its room,
  // and the gradients' columns lie elsewhere.
  auto* probability_rows = reinterpret_cast<Element*>(w.probability);
  auto* grad_score_rows = reinterpret_cast<Element*>(w.grad_score);
  Element* grad_score_columns = kPack > 1 ? w.grad_score_columns : grad_score_rows;
  for (int n = 0; n < plan.num_runs; ++n) {
    const Rectangle& run = plan.run[n];
    for (int l = run.begin; l < run.end; l += kWidth) {
      const Vec lse = load(w.lse + l), delta = load(w.delta + l);
      for (int i = run.first; i < run.last; i += kPack) {
        Vec probability[kPack] = {}, grad[kPack] = {};
        for (int k = 0; k < kPack && i + k < run.last; ++k) {
          const int64_t place = (i + k) * kLaneStride + l;
          probability[k] = Arithmetic::exp2(Arithmetic::scaled(load(w.probability + place), factor) - lse);
          grad[k] = probability[k] * (load(w.grad_score + place) - delta);
          if (capped) grad[k] *= load(w.slope + place);
        }
        const int64_t place = i * kLaneStride + l / kPack;
        const auto rounded = Arithmetic::round(grad);
        Arithmetic::store_rows(probability_rows + place, kLaneStride, Arithmetic::round(probability));
        Arithmetic::store_rows(grad_score_rows + place, kLaneStride, rounded);
        if constexpr (kPack > 1) Arithmetic::store_columns(grad_score_columns + i / kPack * kLaneStride + l, rounded);
      }
    }
  }

  for (int n = 0; wants_query && n < plan.num_strips; ++n) {
    const Rectangle& strip = plan.strip[n];
    const int64_t first = strip.first / kPack;
    multiply<Arithmetic, ALayout::columns>(strip.end - strip.begin, w.key_width,
                                           ceil_div(strip.last - strip.first, kPack),
                                           grad_score_columns + first * kLaneStride + strip.begin, kLaneStride,
                                           w.k_columns.data + first * w.k_columns.stride, w.k_columns.stride,
                                           w.grad_query + strip.begin * w.key_width, w.key_width, true, w.ahead);
  }
  for (int n = 0; grad_key != nullptr && n < plan.num_runs; ++n) {
    const Rectangle& run = plan.run[n];
    const int64_t keys = run.last - run.first, lanes = run.end - run.begin;
    const int64_t place = run.first * kLaneStride + run.begin / kPack;
    multiply<Arithmetic, ALayout::rows>(keys, w.value_width, lanes / kPack, probability_rows + place, kLaneStride,
                                        w.grad.data + run.begin / kPack * w.grad.stride, w.grad.stride,
                                        grad_value + run.first * w.value_width, w.value_width, true, w.ahead);
    multiply<Arithmetic, ALayout::rows>(keys, w.key_width, lanes / kPack, grad_score_rows + place, kLaneStride,
                                        w.q.data + run.begin / kPack * w.q.stride, w.q.stride,
                                        grad_key + run.first * w.key_width, w.key_width, true, w.ahead);
  }
}

// Fills w.k, w.v and, if wanted, w.k_columns with the keys and values of `keys` slots.
template <class Arithmetic>
static void load_tile(BackwardScratch<Arithmetic>& w, const AttentionProblem& p, const ConstView& key,
                      const ConstView& value, int64_t batch, int64_t head, int64_t start, const KeyList& list,
                      int64_t slot, int keys, bool wants_columns) {
  w.k = Arithmetic::key_rows(w.key, w.key_steps, key, batch, head, start, list, slot, keys, p.head_dim);
  w.v = Arithmetic::key_rows(w.value, w.value_steps, value, batch, head, start, list, slot, keys, p.value_dim);
  if (wants_columns) w.k_columns = Arithmetic::columns(w.key_columns, w.key_width, w.k, keys);
}

struct BackwardBlock {
  const Item* item;
  int64_t kv_head, first_row;
};

// Asks for what the block `next` will read first, and for what the block before it will write.
static void ask_for_block(Ahead& ahead, const AttentionBackward& p, const BackwardBlock& next) {
  const Sequence& s = p.sequences[next.item->sequence];
  if (s.query_length == 0) return;
  ahead.add_block(p.query, p, s, next.kv_head, next.first_row, p.head_dim);
  ahead.add_block(p.grad_out, p, s, next.kv_head, next.first_row, p.value_dim);
  ahead.add_block(p.out, p, s, next.kv_head, next.first_row, p.value_dim);
}

// Where the gradients of keys collect: rows of key_width and value_width floats.
struct KeySums {
  float *key, *value;
};

template <class Arithmetic>
static void backward_block(const AttentionBackward& p, const Wanted& wanted, const BackwardBlock& place,
                           const BackwardBlock* next, const KeyList& list, const KeySums& sums,
                           const KeySums& prefix_sums, BackwardScratch<Arithmetic>& w) {
  const Item& item = *place.item;
  const Sequence& s = p.sequences[item.sequence];
  const int64_t group = p.num_heads / p.num_kv_heads, kv_head = place.kv_head, first_row = place.first_row;
  QueryBlock block;
  fill_block(block, p, s, kv_head, first_row);
  begin_block(w, p, block);
  SlotRange range{0, 0};
  if (wanted.query || wanted.keys)
    range = visible_slots(p, s, list, first_row / group, (first_row + block.rows - 1) / group);
  ask_for_keys(w.ahead, p, s, list, kv_head, range.begin, range.end);
  if (wanted.query) w.ahead.add_block(p.grad_query, p, s, kv_head, first_row, p.head_dim);

  const KeyList prefix{nullptr, s.prefix >= 0 && (wanted.query || wanted.prefix) ? s.prefix_length : 0};
  for (int64_t slot = 0; slot < prefix.count; slot += kKeys) {
    const int keys = static_cast<int>(min<int64_t>(kKeys, prefix.count - slot));
    load_tile(w, p, p.prefix_key, p.prefix_value, s.prefix, kv_head, 0, prefix, slot, keys, wanted.query);
    plan_whole(w.plan, keys, block.lanes);
    backward_tile(w, p, wanted.query, nullptr, wanted.prefix ? prefix_sums.key + slot * w.key_width : nullptr,
                  wanted.prefix ? prefix_sums.value + slot * w.value_width : nullptr);
  }
  for (int64_t slot = range.begin; slot < range.end; slot += kKeys) {
    const int keys = static_cast<int>(min<int64_t>(kKeys, range.end - slot));
    load_tile(w, p, p.key, p.value, s.batch, kv_head, s.key_start, list, slot, keys, wanted.query);
    ask_for_keys(w.ahead, p, s, list, kv_head, slot + kKeys, range.end);
    if (slot + kKeys >= range.end && next != nullptr) ask_for_block(w.ahead, p, *next);
    plan_sequence(w.plan, p, s, list, slot, keys, first_row, block.lanes, Arithmetic::kPack);
    const bool masked = p.mask.kind != Mask::Kind::none;
    if (masked) fill_mask(w.mask, block, p.mask, s.key_start, list, slot, keys);
    const int64_t row = slot - item.keys.begin;
    backward_tile(w, p, wanted.query, masked ? w.mask : nullptr, wanted.keys ? sums.key + row * w.key_width : nullptr,
                  wanted.keys ? sums.value + row * w.value_width : nullptr);
  }
  if (wanted.query) {
    alignas(64) float scale[kLanes];
    for (int l = 0; l < kLanes; l += kWidth) store(scale + l, splat(p.scale));
    store_rows(p.grad_query, block, w.grad_query, w.key_width, p.head_dim, scale);
  }
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
