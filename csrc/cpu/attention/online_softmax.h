// The online softmax of a block of queries: tiles of keys update it one after the other.
//
// Each query has a running maximum m, denominator l and accumulator acc. A tile with scores S and values V updates them
// (Milakov & Gimelshein 2018; Dao et al. 2022):
//   m' = max(m, S),  P = 2^(S - m'),  alpha = 2^(m - m'),  l' = alpha l + sum P,  acc' = alpha acc + P^T V.
// A prefix is nothing but more keys: one pass, one softmax, no copy of it for each batch row.
#pragma once

#include "../tiles/arithmetic.h"
#include "../tiles/microkernel.h"
#include "scores.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// Below every score, yet finite: differences with it are defined.
constexpr float kLowest = -1e30f;

template <class Arithmetic>
struct ForwardScratch {
  using Element = typename Arithmetic::Element;
  int64_t block_d, block_dv;                                 // D and Dv in whole vectors of numbers
  int64_t elements_d, elements_dv;                           // and of elements
  Element* query_rows;                                       // [kBlockM, elements_d]
  Element* query_t;                                          // [elements_d, kTileStride], transposed
  Element* value_rows;                                       // [kBlockN, elements_dv], if columns are made of them
  PackedTiles<Element> packed_prefix_keys, packed_keys;      // rows
  PackedTiles<Element> packed_prefix_values, packed_values;  // columns
  float *scores, *mask;                                      // [kBlockN, kTileStride]
  float *m, *l;                                              // [kBlockM]
  float* acc;                                                // [kBlockM, block_dv]
  MatrixView<Element> k, v;                                  // the tile at hand: rows of keys, columns of values
  TilePlan plan;
  Prefetcher prefetcher;

  // `most_prefix_keys`, `most_keys`: how many of each stay packed for the next block.
  ForwardScratch(const AttentionProblem& p, int64_t most_prefix_keys, int64_t most_keys, Arena& arena)
      : block_d(round_up(p.head_dim, kLanes)),
        block_dv(round_up(p.value_dim, kLanes)),
        elements_d(padded_elements<Arithmetic>(p.head_dim)),
        elements_dv(padded_elements<Arithmetic>(p.value_dim)),
        packed_prefix_keys(packed_rows(p, most_prefix_keys, arena)),
        packed_keys(packed_rows(p, most_keys, arena)),
        packed_prefix_values(packed_columns(p, most_prefix_keys, arena)),
        packed_values(packed_columns(p, most_keys, arena)) {
    query_rows = arena.allocate<Element>(kBlockM * elements_d);
    query_t = arena.allocate<Element>(elements_d * kTileStride);
    value_rows = arena.allocate<Element>(kPack > 1 ? kBlockN * elements_dv : 0);
    scores = arena.allocate<float>(kBlockN * kTileStride);
    mask = arena.allocate<float>(p.mask.kind == Mask::Kind::none ? 0 : kBlockN * kTileStride);
    acc = arena.allocate<float>(kBlockM * block_dv);
    m = arena.allocate<float>(kBlockM);
    l = arena.allocate<float>(kBlockM);
  }

 private:
  static constexpr int64_t kPack = Arithmetic::kPack;
  PackedTiles<Element> packed_rows(const AttentionProblem& p, int64_t keys, Arena& arena) const {
    return {keys, elements_d, ceil_div(p.head_dim, kPack), 1, arena};
  }
  PackedTiles<Element> packed_columns(const AttentionProblem& p, int64_t keys, Arena& arena) const {
    return {keys, block_dv, p.value_dim, kPack, arena};
  }
};

// Loads the queries of a block; m, l and acc are those before the first tile. `sinks` may be null: parts of a softmax
// that is merged later leave the sink to the merge.
template <class Arithmetic>
static void begin_block(ForwardScratch<Arithmetic>& w, const AttentionProblem& p, const QueryBlock& block,
                        const float* sinks) {
  const auto rows = load_rows<Arithmetic>(w.query_rows, w.elements_d, p.query, block, p.head_dim);
  transpose_queries<Arithmetic>(w.query_t, rows, w.elements_d, p, block.padded);
  for (int i = 0; i < kBlockM; ++i) {
    // A sink is a key without a value: it only opens the denominator.
    const float sink = sinks != nullptr && i < block.count ? sinks[block.query[i].head] * kLog2e : -kInfinity;
    w.m[i] = max(sink, kLowest);
    w.l[i] = sink >= kLowest ? 1.0f : 0.0f;
  }
}

// Of queries [begin, end).
template <class Arithmetic>
static void zero_acc(ForwardScratch<Arithmetic>& w, int64_t begin, int64_t end) {
  for (int64_t i = begin * w.block_dv; i < end * w.block_dv; i += kLanes) store(w.acc + i, Vec{});
}

// Multiplies row i of kLanes rows by factor[i].
static void scale_rows(float* rows, int64_t width, Vec factor) {
  alignas(64) float each[kLanes];
  store(each, factor);
  for (int i = 0; i < kLanes; ++i)
    for (int64_t d = 0; d < width; d += kLanes) store(rows + i * width + d, load(rows + i * width + d) * each[i]);
}

// The maximum over keys, for kLanes queries. Four independent maxima: in a single chain of max instructions each would
// wait for the result of the one before.
PREFIXCORE_INLINE Vec column_max(const float* scores, int key_begin, int key_end) {
  constexpr int kChains = 4;
  Vec highest[kChains];
  for (int n = 0; n < kChains; ++n) highest[n] = splat(-kInfinity);
  int i = key_begin;
  for (; i + kChains <= key_end; i += kChains)
    for (int n = 0; n < kChains; ++n) highest[n] = max(load(scores + (i + n) * kTileStride), highest[n]);
  for (; i < key_end; ++i) highest[0] = max(load(scores + i * kTileStride), highest[0]);
  return max(max(highest[0], highest[1]), max(highest[2], highest[3]));
}

// Updates m, l and, by alpha, acc of kLanes queries from `query` on. Their scores of the strip's keys become
// probabilities, as columns.
template <class Arithmetic>
PREFIXCORE_INLINE void update_softmax(ForwardScratch<Arithmetic>& w, const Rectangle& strip, int query, float factor,
                                      bool first) {
  constexpr int kPack = Arithmetic::kPack;
  float* scores = w.scores + query;
  const Vec m_before = load(w.m + query);
  Vec m = max(Arithmetic::scaled(column_max(scores, strip.key_begin, strip.key_end), factor), m_before);
  Vec l = load(w.l + query);
  if (!any(m > m_before + Arithmetic::kRescaleThreshold)) {
    m = m_before;
  } else {
    const Vec alpha = exp2(m_before - m);
    l *= alpha;
    if (!first) scale_rows(w.acc + query * w.block_dv, w.block_dv, alpha);
    store(w.m + query, m);
  }
  const int end = strip.key_begin + kPack * static_cast<int>(product_depth<Arithmetic>(strip.keys()));
#pragma GCC unroll 4
  for (int i = strip.key_begin; i < end; i += kPack) {
    Vec probability[kPack];
    for (int n = 0; n < kPack; ++n) {
      probability[n] = i + n < strip.key_end
                           ? Arithmetic::exp2(Arithmetic::scaled(load(scores + (i + n) * kTileStride), factor) - m)
                           : Vec{};
      l += probability[n];
    }
    Arithmetic::store_columns(reinterpret_cast<typename Arithmetic::Element*>(scores + i * kTileStride),
                              Arithmetic::round(probability));
  }
  store(w.l + query, l);
}

// Updates the softmax of `queries` queries with the tile w.k, w.v. Before the `first` tile acc holds no numbers.
template <class Arithmetic>
static void update_tile(ForwardScratch<Arithmetic>& w, const AttentionProblem& p, int queries, const float* mask,
                        bool first) {
  constexpr int kPack = Arithmetic::kPack;
  using Element = typename Arithmetic::Element;
  const TilePlan& plan = w.plan;
  for (int n = 0; n < plan.num_runs; ++n) {  // S = K Q^T
    const Rectangle& run = plan.run[n];
    multiply<Arithmetic, ALayout::rows>(run.keys(), run.queries(), product_depth<Arithmetic>(p.head_dim),
                                        w.k.data + run.key_begin * w.k.stride, w.k.stride, w.query_t + run.query_begin,
                                        kTileStride, w.scores + run.key_begin * kTileStride + run.query_begin,
                                        kTileStride, false, w.prefetcher);
  }
  const float factor = finish_score_tile<Arithmetic>(p, plan, w.scores, nullptr, mask);

  int query = 0;
  for (int n = 0; n < plan.num_strips; ++n) {  // acc += P^T V
    const Rectangle& strip = plan.strip[n];
    for (int i = strip.query_begin; i < strip.query_end; i += kLanes) update_softmax(w, strip, i, factor, first);
    if (first) zero_acc(w, query, strip.query_begin);
    multiply<Arithmetic, ALayout::columns>(
        strip.queries(), w.block_dv, product_depth<Arithmetic>(strip.keys()),
        reinterpret_cast<const Element*>(w.scores + strip.key_begin * kTileStride + strip.query_begin),
        kPack * kTileStride, w.v.data + strip.key_begin / kPack * w.v.stride, w.v.stride,
        w.acc + strip.query_begin * w.block_dv, w.block_dv, !first, w.prefetcher);
    query = strip.query_end;
  }
  if (first) zero_acc(w, query, queries);
}

// Fills w.k and w.v with `keys` keys from `first_key` on, which is number `number` of the packed ones.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static void load_tile(ForwardScratch<Arithmetic>& w, const KeyValues& from, int64_t first_key, int keys,
                      PackedTiles<Element>& packed_keys, PackedTiles<Element>& packed_values, int64_t number) {
  w.k = packed_keys.get(number, keys, [&](Element* buffer) {
    return Arithmetic::key_rows(buffer, w.elements_d, from.key, first_key, keys);
  });
  w.v = packed_values.get(number, keys, [&](Element* buffer) {
    Element* rows_buffer = Arithmetic::kPack > 1 ? w.value_rows : buffer;
    const auto rows = Arithmetic::key_rows(rows_buffer, w.elements_dv, from.value, first_key, keys);
    return Arithmetic::columns(buffer, w.block_dv, rows, keys);
  });
}

// The update with a range of a prefix, which comes before all other tiles and is seen by every query.
template <class Arithmetic>
static void update_prefix(ForwardScratch<Arithmetic>& w, const AttentionProblem& p, const KeyValues& prefix,
                          const KeyRange& range, int queries) {
  for (int64_t key = range.begin; key < range.end; key += kBlockN) {
    const int keys = static_cast<int>(min<int64_t>(kBlockN, range.end - key));
    load_tile(w, prefix, key, keys, w.packed_prefix_keys, w.packed_prefix_values, key - range.begin);
    prefetch_key_values(w.prefetcher, prefix, key + keys, range.end);
    plan_full_tile(w.plan, keys, queries);
    update_tile(w, p, queries, nullptr, key == range.begin);
  }
}

// The update with a range of a sequence's own keys, `first` of all tiles or not. Calls before_tile(key) when a tile is
// loaded: its products prefetch whatever that adds to the prefetcher.
template <class Arithmetic, class BeforeTile>
static void update_sequence(ForwardScratch<Arithmetic>& w, const AttentionProblem& p, const QueryBlock& block,
                            const Sequence& s, const KeyValues& sequence, const KeyRange& range, int64_t first_query,
                            bool first, BeforeTile before_tile) {
  for (int64_t key = range.begin; key < range.end; key += kBlockN, first = false) {
    const int keys = static_cast<int>(min<int64_t>(kBlockN, range.end - key));
    load_tile(w, sequence, key, keys, w.packed_keys, w.packed_values, key - range.begin);
    before_tile(key);
    plan_sequence_tile<Arithmetic>(w.plan, p, s, sequence.key.list, key, keys, first_query, block.padded);
    const bool masked = p.mask.kind != Mask::Kind::none;
    if (masked) load_mask_tile(w.mask, p.mask, block, sequence.key, key, keys);
    update_tile(w, p, block.padded, masked ? w.mask : nullptr, first);
  }
  if (first) zero_acc(w, 0, block.padded);
}

// Divides acc by l and writes the block's outputs and log-sum-exps.
template <class Arithmetic>
static void finish_block(ForwardScratch<Arithmetic>& w, const AttentionForwardProblem& p, const QueryBlock& block) {
  alignas(64) float lse[kBlockM];
  for (int i = 0; i < block.padded; i += kLanes) {
    const Vec l = load(w.l + i);
    const VecInt sees = l != 0.0f;  // NaN, which comes of a score that is NaN, is left to be seen
    store(lse + i, select(sees, (load(w.m + i) + log2_or_nan(l)) * kLn2, splat(-kInfinity)));
    store(w.l + i, select(sees, 1.0f / l, Vec{}));
  }
  store_rows(p.out, block, w.acc, w.block_dv, p.value_dim, w.l);
  if (p.lse != nullptr)
    for (int i = 0; i < block.count; ++i) p.lse[lse_offset(p.lse_stride, block.query[i])] = lse[i];
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
