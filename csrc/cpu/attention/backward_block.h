// Backward: one pass, blocks of query rows outside, tiles of keys inside.
//
// With L the log-sum-exp over prefix and sequence together and delta = <dO, O> - dL:
//   P = exp(S - L),  dV = P^T dO,  dS = scale P * (dO V^T - delta),  dK = dS^T Q,  dQ = dS K.
// Probabilities are recomputed, so a tile costs five products. dQ of the block stays in the cache
// over all tiles; dK and dV of the whole sequence (and of the prefix) collect in float32: where they are wanted if
// that is float32 rows near each other, else in scratch.
#pragma once

#include "../tiles/arithmetic.h"
#include "../tiles/microkernel.h"
#include "../tiles/packed_tiles.h"
#include "backward_schedule.h"
#include "scores.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

static void fill_zero(float* to, int64_t count) {
  if (count > 0) __builtin_memset(to, 0, static_cast<size_t>(count) * sizeof(float));
}

struct Wanted {
  bool query, keys, prefix;
};

// Rows of whole vectors, `stride` floats apart, in which gradients collect.
struct SumRows {
  float* data = nullptr;
  int64_t stride = 0;

  SumRows from(int64_t row) const { return {data + row * stride, stride}; }

  void fill_zero(int64_t first, int64_t last, int64_t width) const {
    if (stride == width) return PREFIXCORE_ISA::fill_zero(data + first * width, (last - first) * width);
    for (int64_t i = first; i < last; ++i) PREFIXCORE_ISA::fill_zero(data + i * stride, width);
  }
};

// Where the gradients of keys collect. Only the first `written` rows hold numbers.
struct KeySums {
  SumRows key, value;
  int64_t written = 0;
};

template <class Arithmetic>
struct BackwardScratch {
  using Element = typename Arithmetic::Element;
  int64_t key_width, value_width;     // head sizes rounded up to whole vectors of numbers
  int64_t key_steps, value_steps;     // and of elements
  float *query_room, *grad_out_room;  // [kLanes, key_width], [kLanes, value_width]: rows, and later results
  TileRows<Element> q, grad;          // columns of the block: [lanes / kPack, key_width], ...
  Element *query, *grad_out;          // its rows transposed, [key_steps, kLaneStride], ...
  float* grad_query_room;             // [kLanes, key_width]
  SumRows grad_query;                 // the same, or where the block's gradient is wanted
  KeptTiles<Element> prefix_keys, prefix_values, keys, values;  // rows
  Element *query_columns, *grad_out_columns, *key_columns;      // room for what is packed as columns
  float *probability, *grad_score;                              // [kKeys, kLaneStride]
  Element* grad_score_columns;                                  // [kKeys / kPack, kLaneStride]
  float *slope, *mask;                                          // [kKeys, kLaneStride] of softcap and mask
  float *lse, *delta;                                           // [kLanes], lse in units of log 2
  float *grad_key, *grad_value;                // of a sequence that is one item: [keys, key_width], ...
  float *grad_prefix_key, *grad_prefix_value;  // of a prefix that is one slot: [P, key_width], ...
  TileRows<Element> k, v, k_columns;           // the tile at hand
  TilePlan plan;
  Ahead ahead;

  // `most_keys`: of an item; `key_rows`: of gradients in scratch.
  BackwardScratch(const AttentionProblem& p, const Wanted& wanted, int64_t most_keys, int64_t key_rows, Carver& carve)
      : key_width(round_up(p.head_dim, kWidth)),
        value_width(round_up(p.value_dim, kWidth)),
        key_steps(steps<Arithmetic>(p.head_dim)),
        value_steps(steps<Arithmetic>(p.value_dim)),
        prefix_keys(to_keep(p, p.prefix_capacity, key_steps, p.head_dim, carve)),
        prefix_values(to_keep(p, p.prefix_capacity, value_steps, p.value_dim, carve)),
        keys(to_keep(p, most_keys, key_steps, p.head_dim, carve)),
        values(to_keep(p, most_keys, value_steps, p.value_dim, carve)) {
    constexpr int64_t kPack = Arithmetic::kPack;
    query_room = carve.take<float>(kLanes * key_width);
    grad_out_room = carve.take<float>(kLanes * value_width);
    query = carve.take<Element>(key_steps * kLaneStride);
    grad_out = carve.take<Element>(value_steps * kLaneStride);
    grad_query_room = carve.take<float>(kLanes * key_width);
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

 private:
  static KeptTiles<Element> to_keep(const AttentionProblem& p, int64_t count, int64_t width, int64_t dim,
                                    Carver& carve) {
    return {keys_to_keep(p, count), width, ceil_div(dim, Arithmetic::kPack), 1, carve};
  }
};

// `rows` rows of a gradient from `place` on if rows of `width` floats can be summed there, else `room`.
static SumRows rows_or_room(const View& gradient, const Row& place, int64_t rows, int64_t count, int64_t width,
                            float* room) {
  const int64_t stride = gradient.stride[2];
  const bool near = stride == width || rows <= kScatteredRows;
  if (gradient.dtype != DType::f32 || count != width || !near) return {room, width};
  return {static_cast<float*>(gradient.data) + row_offset(gradient.stride, place), stride};
}

template <class Arithmetic, class Element = typename Arithmetic::Element>
static void begin_block(BackwardScratch<Arithmetic>& w, const AttentionBackward& p, const QueryBlock& block) {
  const auto query_rows =
      load_rows<Arithmetic>(reinterpret_cast<Element*>(w.query_room), w.key_steps, p.query, block, p.head_dim);
  transpose_query<Arithmetic>(w.query, query_rows, w.key_steps, p, block.lanes);
  w.q = Arithmetic::columns(w.query_columns, w.key_width, query_rows, block.lanes);

  const auto grad_out_rows =
      load_rows<Arithmetic>(reinterpret_cast<Element*>(w.grad_out_room), w.value_steps, p.grad_out, block, p.value_dim);
  const auto out_rows = load_rows<Arithmetic>(w.grad_out, w.value_steps, p.out, block, p.value_dim);
  row_dots<Arithmetic>(w.delta, out_rows, grad_out_rows, w.value_steps, block.lanes);
  transpose(reinterpret_cast<float*>(w.grad_out), kLaneStride, reinterpret_cast<const float*>(grad_out_rows.data),
            grad_out_rows.stride, block.lanes, w.value_steps, nullptr);
  w.grad = Arithmetic::columns(w.grad_out_columns, w.value_width, grad_out_rows, block.lanes);
  w.grad_query = {w.grad_query_room, w.key_width};
  if (p.grad_query.data != nullptr && p.num_heads == p.num_kv_heads && block.rows > 0)
    w.grad_query = rows_or_room(p.grad_query, block.row[0], block.rows, p.head_dim, w.key_width, w.grad_query_room);
  for (int i = 0; i < kLanes; ++i) {
    w.lse[i] = kInfinity;  // makes every probability 0: lanes without a row, rows that see nothing
    if (i >= block.rows) continue;
    const Row& r = block.row[i];
    const int64_t place = r.batch * p.lse_stride[0] + r.head * p.lse_stride[1] + r.token;
    if (p.lse[place] > -kInfinity) w.lse[i] = p.lse[place] * kLog2e;
    if (p.grad_lse != nullptr) w.delta[i] -= p.grad_lse[place];
    w.delta[i] *= p.scale;
  }
}

// How many rows of the sums of a tile's keys its products are added to. The rest they replace: if they do not cover it,
// it is zeroed.
template <class Arithmetic>
static int64_t rows_to_keep(const BackwardScratch<Arithmetic>& w, const KeySums& sums, int64_t keys) {
  int64_t covered = sums.written;
  for (int n = 0; n < w.plan.num_runs; ++n)
    if (w.plan.run[n].first == covered) covered = w.plan.run[n].last;
  if (covered >= keys) return sums.written;
  sums.key.fill_zero(sums.written, keys, w.key_width);
  sums.value.fill_zero(sums.written, keys, w.value_width);
  return keys;
}

// The tile w.k, w.v of `keys` keys seen by `rows` queries. Gradients are added to grad_query in w, which holds no
// numbers before the `first` tile, and, if wanted, to `sums` of the tile's keys.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static void backward_tile(BackwardScratch<Arithmetic>& w, const AttentionBackward& p, bool wants_query, bool first,
                          const float* mask, int rows, int64_t keys, const KeySums& sums) {
  constexpr int kPack = Arithmetic::kPack;
  const TilePlan& plan = w.plan;
  for (int n = 0; n < plan.num_runs; ++n) {
    const Rectangle& run = plan.run[n];
    const int64_t height = run.last - run.first, lanes = run.end - run.begin;
    const int64_t place = run.first * kLaneStride + run.begin;
    multiply<Arithmetic, ALayout::rows>(height, lanes, depth<Arithmetic>(p.head_dim), w.k.data + run.first * w.k.stride,
                                        w.k.stride, w.query + run.begin, kLaneStride, w.probability + place,
                                        kLaneStride, false, w.ahead);
    multiply<Arithmetic, ALayout::rows>(height, lanes, depth<Arithmetic>(p.value_dim),
                                        w.v.data + run.first * w.v.stride, w.v.stride, w.grad_out + run.begin,
                                        kLaneStride, w.grad_score + place, kLaneStride, false, w.ahead);
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
    const int end = run.first + kPack * static_cast<int>(depth<Arithmetic>(run.last - run.first));
    for (int l = run.begin; l < run.end; l += kWidth) {
      const Vec lse = load(w.lse + l), delta = load(w.delta + l);
      for (int i = run.first; i < end; i += kPack) {
        Vec probability[kPack] = {}, grad[kPack] = {};
        for (int k = 0; k < kPack && i + k < run.last; ++k) {
          const int64_t place = (i + k) * kLaneStride + l;
          probability[k] = Arithmetic::exp2(Arithmetic::scaled(load(w.probability + place), factor) - lse);
          grad[k] = probability[k] * (load(w.grad_score + place) * p.scale - delta);
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

  int lane = 0;
  for (int n = 0; wants_query && n < plan.num_strips; ++n) {
    const Rectangle& strip = plan.strip[n];
    const int64_t step = strip.first / kPack;
    if (first) w.grad_query.fill_zero(lane, strip.begin, w.key_width);
    lane = min(strip.end, rows);
    multiply<Arithmetic, ALayout::columns>(lane - strip.begin, w.key_width, depth<Arithmetic>(strip.last - strip.first),
                                           grad_score_columns + step * kLaneStride + strip.begin, kLaneStride,
                                           w.k_columns.data + step * w.k_columns.stride, w.k_columns.stride,
                                           w.grad_query.from(strip.begin).data, w.grad_query.stride, !first, w.ahead);
  }
  if (wants_query && first) w.grad_query.fill_zero(lane, rows, w.key_width);

  const bool wants_keys = sums.key.data != nullptr;
  const int64_t keep = wants_keys ? rows_to_keep(w, sums, keys) : 0;
  for (int n = 0; wants_keys && n < plan.num_runs; ++n) {
    const Rectangle& run = plan.run[n];
    const int64_t height = run.last - run.first, lanes = run.end - run.begin;
    const int64_t place = run.first * kLaneStride + run.begin / kPack;
    multiply<Arithmetic, ALayout::rows>(height, w.value_width, lanes / kPack, probability_rows + place, kLaneStride,
                                        w.grad.data + run.begin / kPack * w.grad.stride, w.grad.stride,
                                        sums.value.from(run.first).data, sums.value.stride, run.first < keep, w.ahead);
    multiply<Arithmetic, ALayout::rows>(height, w.key_width, lanes / kPack, grad_score_rows + place, kLaneStride,
                                        w.q.data + run.begin / kPack * w.q.stride, w.q.stride,
                                        sums.key.from(run.first).data, sums.key.stride, run.first < keep, w.ahead);
  }
}

// Fills w.k, w.v and, if wanted, w.k_columns with the keys and values of `keys` slots, of which the first is number
// `first` in `key_tiles` and `value_tiles`.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static void load_tile(BackwardScratch<Arithmetic>& w, const AttentionProblem& p, const ConstView& key,
                      const ConstView& value, int64_t batch, int64_t head, int64_t start, const KeyList& list,
                      int64_t slot, int keys, KeptTiles<Element>& key_tiles, KeptTiles<Element>& value_tiles,
                      int64_t first, bool wants_columns) {
  w.k = key_tiles.of(first, keys, [&](Element* room) {
    return Arithmetic::key_rows(room, w.key_steps, key, batch, head, start, list, slot, keys, p.head_dim);
  });
  w.v = value_tiles.of(first, keys, [&](Element* room) {
    return Arithmetic::key_rows(room, w.value_steps, value, batch, head, start, list, slot, keys, p.value_dim);
  });
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

// Asks for the rows of `sums` up to `rows` that will be written first by this block.
template <class Arithmetic>
static void ask_for_rest(BackwardScratch<Arithmetic>& w, const KeySums& sums, int64_t rows) {
  const int64_t bytes = sizeof(float), rest = rows - sums.written;
  const SumRows value = sums.value.from(sums.written), key = sums.key.from(sums.written);
  w.ahead.add(value.data, value.stride * bytes, rest, w.value_width * bytes);
  w.ahead.add(key.data, key.stride * bytes, rest, w.key_width * bytes);
}

// The rows of `sums` for the keys of one tile, from `row` on.
static KeySums tile_sums(const KeySums& sums, int64_t row) {
  return {sums.key.from(row), sums.value.from(row), max<int64_t>(sums.written - row, 0)};
}

template <class Arithmetic>
static void backward_block(const AttentionBackward& p, const Wanted& wanted, const BackwardBlock& place,
                           const BackwardBlock* next, const KeyList& list, KeySums& sums, KeySums& prefix_sums,
                           BackwardScratch<Arithmetic>& w) {
  const Item& item = *place.item;
  const Sequence& s = p.sequences[item.sequence];
  const int64_t group = p.num_heads / p.num_kv_heads, kv_head = place.kv_head, first_row = place.first_row;
  QueryBlock block;
  fill_block<Arithmetic>(block, p, s, kv_head, first_row);
  begin_block(w, p, block);
  SlotRange range{0, 0};
  if (wanted.query || wanted.keys)
    range = visible_slots(p, s, list, first_row / group, (first_row + block.rows - 1) / group);
  ask_for_tile(w.ahead, w.keys, w.values, p, s, list, kv_head, range.begin, range.end, 0);
  if (wanted.keys) ask_for_rest(w, sums, range.end - item.keys.begin);
  if (wanted.query) w.ahead.add_block(p.grad_query, p, s, kv_head, first_row, p.head_dim);

  const KeyList prefix{nullptr, s.prefix >= 0 && (wanted.query || wanted.prefix) ? s.prefix_length : 0};
  bool first = true;
  for (int64_t slot = 0; slot < prefix.count; slot += kKeys, first = false) {
    const int keys = static_cast<int>(min<int64_t>(kKeys, prefix.count - slot));
    load_tile(w, p, p.prefix_key, p.prefix_value, s.prefix, kv_head, 0, prefix, slot, keys, w.prefix_keys,
              w.prefix_values, slot, wanted.query);
    plan_whole(w.plan, keys, block.lanes);
    backward_tile(w, p, wanted.query, first, nullptr, block.rows, keys,
                  wanted.prefix ? tile_sums(prefix_sums, slot) : KeySums{});
    prefix_sums.written = max(prefix_sums.written, slot + keys);
  }
  for (int64_t slot = range.begin; slot < range.end; slot += kKeys, first = false) {
    const int keys = static_cast<int>(min<int64_t>(kKeys, range.end - slot));
    load_tile(w, p, p.key, p.value, s.batch, kv_head, s.key_start, list, slot, keys, w.keys, w.values,
              slot - range.begin, wanted.query);
    const int64_t after = slot + kKeys;
    ask_for_tile(w.ahead, w.keys, w.values, p, s, list, kv_head, after, range.end, after - range.begin);
    if (after >= range.end && next != nullptr) ask_for_block(w.ahead, p, *next);
    plan_sequence<Arithmetic>(w.plan, p, s, list, slot, keys, first_row, block.lanes);
    const bool masked = p.mask.kind != Mask::Kind::none;
    if (masked) fill_mask(w.mask, block, p.mask, s.key_start, list, slot, keys);
    const int64_t row = slot - item.keys.begin;
    backward_tile(w, p, wanted.query, first, masked ? w.mask : nullptr, block.rows, keys,
                  wanted.keys ? tile_sums(sums, row) : KeySums{});
    sums.written = max(sums.written, row + keys);
  }
  if (!wanted.query) return;
  if (first) w.grad_query.fill_zero(0, block.rows, w.key_width);
  if (w.grad_query.data == w.grad_query_room)
    store_rows(p.grad_query, block, w.grad_query_room, w.key_width, p.head_dim, nullptr);
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
