// Backward: one pass, blocks of query rows outside, tiles of keys inside.
//
// With L the log-sum-exp over prefix and sequence together and delta = <dO, O> - dL:
//   P = exp(S - L),  dV = P^T dO,  dS = P * (dO V^T - delta),  dK = scale dS^T Q,  dQ = scale dS K.
// Probabilities are recomputed, so a tile costs five products. dQ of the block stays in the cache
// over all tiles; dK and dV of the whole sequence (and of the prefix) collect in float32.
#pragma once

#include "backward_schedule.h"
#include "microkernel.h"
#include "scores.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

struct Wanted {
  bool query, keys, prefix;
};

struct BackwardScratch {
  int64_t key_width, value_width;
  float *query_rows, *grad_out_rows;           // [kLanes, key_width], [kLanes, value_width]
  float *query, *grad_out;                     // the same transposed; the query scaled
  float* grad_query;                           // [key_width, kLaneStride] transposed
  float *key, *value;                          // room for a packed tile: [kKeys, key_width], ...
  float *probability, *grad_score;             // [kKeys, kLaneStride]
  float *slope, *mask;                         // [kKeys, kLaneStride] of softcap and mask
  float *lse, *delta;                          // [kLanes], lse in units of log 2
  float *grad_key, *grad_value;                // of a sequence that is one item: [keys, key_width], ...
  float *grad_prefix_key, *grad_prefix_value;  // of a prefix that is one slot: [P, key_width], ...
  TileRows k, v;                               // the tile at hand
  TilePlan plan;
  Ahead ahead;

  BackwardScratch(const AttentionProblem& p, const Wanted& wanted, int64_t key_rows, Carver& carve)
      : key_width(round_up(p.head_dim, kWidth)), value_width(round_up(p.value_dim, kWidth)) {
    query_rows = carve.take<float>(kLanes * key_width);
    grad_out_rows = carve.take<float>(kLanes * value_width);
    query = carve.take<float>(key_width * kLaneStride);
    grad_out = carve.take<float>(max(value_width * kLaneStride, kLanes * value_width));
    grad_query = carve.take<float>(key_width * kLaneStride);
    key = carve.take<float>(kKeys * key_width);
    value = carve.take<float>(kKeys * value_width);
    probability = carve.take<float>(kKeys * kLaneStride);
    grad_score = carve.take<float>(kKeys * kLaneStride);
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

static void begin_block(BackwardScratch& w, const AttentionBackward& p, const QueryBlock& block) {
  alignas(64) float factor[kWidth];
  store(factor, splat(query_factor(p)));
  load_rows(w.query_rows, w.key_width, p.query, block, p.head_dim);
  for (int64_t d = 0; d < w.key_width; d += kWidth)
    transpose(w.query + d * kLaneStride, kLaneStride, w.query_rows + d, w.key_width, block.lanes, kWidth, factor);
  load_rows(w.grad_out_rows, w.value_width, p.grad_out, block, p.value_dim);
  load_rows(w.grad_out, w.value_width, p.out, block, p.value_dim);  // the output, for delta alone
  row_dots(w.delta, w.grad_out, w.grad_out_rows, w.value_width, block.lanes);
  transpose(w.grad_out, kLaneStride, w.grad_out_rows, w.value_width, block.lanes, w.value_width, nullptr);
  fill_zero(w.grad_query, w.key_width * kLaneStride);
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
static void backward_tile(BackwardScratch& w, const AttentionBackward& p, bool wants_query, const float* mask,
                          float* grad_key, float* grad_value) {
  const TilePlan& plan = w.plan;
  for (int n = 0; n < plan.num_runs; ++n) {
    const Run& run = plan.run[n];
    const int64_t keys = run.last - run.first, lanes = run.end - run.begin;
    const int64_t place = run.first * kLaneStride + run.begin;
    multiply<ALayout::rows>(keys, lanes, p.head_dim, w.k.data + run.first * w.k.stride, w.k.stride, w.query + run.begin,
                            kLaneStride, w.probability + place, kLaneStride, false, w.ahead);
    multiply<ALayout::rows>(keys, lanes, p.value_dim, w.v.data + run.first * w.v.stride, w.v.stride,
                            w.grad_out + run.begin, kLaneStride, w.grad_score + place, kLaneStride, false, w.ahead);
  }
  const bool capped = p.softcap > 0;
  if (capped || mask != nullptr || plan.partial) finish_scores(p, plan, w.probability, w.slope, mask);

  for (int n = 0; n < plan.num_runs; ++n) {
    const Run& run = plan.run[n];
    for (int l = run.begin; l < run.end; l += kWidth) {
      const Vec lse = load(w.lse + l), delta = load(w.delta + l);
      for (int i = run.first; i < run.last; ++i) {
        const int64_t place = i * kLaneStride + l;
        const Vec probability = exp2(load(w.probability + place) - lse);
        Vec grad = probability * (load(w.grad_score + place) - delta);
        if (capped) grad *= load(w.slope + place);
        store(w.probability + place, probability);
        store(w.grad_score + place, grad);
      }
    }
  }

  for (int n = 0; n < plan.num_runs; ++n) {
    const Run& run = plan.run[n];
    const int64_t keys = run.last - run.first, lanes = run.end - run.begin;
    const int64_t place = run.first * kLaneStride + run.begin;
    if (wants_query)
      multiply<ALayout::columns>(p.head_dim, lanes, keys, w.k.data + run.first * w.k.stride, w.k.stride,
                                 w.grad_score + place, kLaneStride, w.grad_query + run.begin, kLaneStride, true,
                                 w.ahead);
    if (grad_key == nullptr) continue;
    multiply<ALayout::rows>(keys, w.value_width, lanes, w.probability + place, kLaneStride,
                            w.grad_out_rows + run.begin * w.value_width, w.value_width,
                            grad_value + run.first * w.value_width, w.value_width, true, w.ahead);
    multiply<ALayout::rows>(keys, w.key_width, lanes, w.grad_score + place, kLaneStride,
                            w.query_rows + run.begin * w.key_width, w.key_width, grad_key + run.first * w.key_width,
                            w.key_width, true, w.ahead);
  }
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

static void backward_block(const AttentionBackward& p, const Wanted& wanted, const BackwardBlock& place,
                           const BackwardBlock* next, const KeyList& list, const KeySums& sums,
                           const KeySums& prefix_sums, BackwardScratch& w) {
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
    w.k = tile_rows(w.key, w.key_width, p.prefix_key, s.prefix, kv_head, 0, prefix, slot, keys, p.head_dim, true);
    w.v =
        tile_rows(w.value, w.value_width, p.prefix_value, s.prefix, kv_head, 0, prefix, slot, keys, p.value_dim, true);
    plan_whole(w.plan, keys, block.lanes);
    backward_tile(w, p, wanted.query, nullptr, wanted.prefix ? prefix_sums.key + slot * w.key_width : nullptr,
                  wanted.prefix ? prefix_sums.value + slot * w.value_width : nullptr);
  }
  for (int64_t slot = range.begin; slot < range.end; slot += kKeys) {
    const int keys = static_cast<int>(min<int64_t>(kKeys, range.end - slot));
    w.k = tile_rows(w.key, w.key_width, p.key, s.batch, kv_head, s.key_start, list, slot, keys, p.head_dim, true);
    w.v =
        tile_rows(w.value, w.value_width, p.value, s.batch, kv_head, s.key_start, list, slot, keys, p.value_dim, true);
    ask_for_keys(w.ahead, p, s, list, kv_head, slot + kKeys, range.end);
    if (slot + kKeys >= range.end && next != nullptr) ask_for_block(w.ahead, p, *next);
    plan_sequence(w.plan, p, s, list, slot, keys, first_row, block.lanes);
    const bool masked = p.mask.kind != Mask::Kind::none;
    if (masked) fill_mask(w.mask, block, p.mask, s.key_start, list, slot, keys);
    const int64_t row = slot - item.keys.begin;
    backward_tile(w, p, wanted.query, masked ? w.mask : nullptr, wanted.keys ? sums.key + row * w.key_width : nullptr,
                  wanted.keys ? sums.value + row * w.value_width : nullptr);
  }
  if (wanted.query) {
    alignas(64) float scale[kLanes];
    for (int l = 0; l < kLanes; l += kWidth) store(scale + l, splat(p.scale));
    // The query rows are no longer needed: their room takes the transposed gradient.
    transpose(w.query_rows, w.key_width, w.grad_query, kLaneStride, w.key_width, block.lanes, scale);
    store_rows(p.grad_query, block, w.query_rows, w.key_width, p.head_dim);
  }
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
