// Decode, the part for few queries: a handful of them against a long range of keys.
//
// With so few queries the columns of a transposed tile would be mostly empty, and the time goes into reading keys and
// values anyway. So scores are not transposed here: keys are the SIMD lanes, and scores are dot products along the
// head, several keys and queries at a time, on float32 keys and values in place.
#pragma once

#include "online_softmax.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

constexpr int kDecodeQueries = 16;  // at most so many queries of a sequence and a key/value head

struct DecodeScratch {
  int64_t block_d, block_dv;  // D and Dv in whole vectors
  float* query;               // [kDecodeQueries, block_d], scaled
  float *key, *value;         // [kBlockN, block_d], [kBlockN, block_dv]
  float* scores;              // [kDecodeQueries, kBlockN]
  float* mask;                // [kBlockN], of one query
  float *m, *l;               // [kDecodeQueries]
  float* acc;                 // [kDecodeQueries, block_dv]
  Prefetcher prefetcher;

  DecodeScratch(const AttentionProblem& p, Arena& arena)
      : block_d(round_up(p.head_dim, kLanes)), block_dv(round_up(p.value_dim, kLanes)) {
    query = arena.allocate<float>(kDecodeQueries * block_d);
    key = arena.allocate<float>(kBlockN * block_d);
    value = arena.allocate<float>(kBlockN * block_dv);
    scores = arena.allocate<float>(kDecodeQueries * kBlockN);
    mask = arena.allocate<float>(kBlockN);
    acc = arena.allocate<float>(kDecodeQueries * block_dv);
    m = arena.allocate<float>(kDecodeQueries);
    l = arena.allocate<float>(kDecodeQueries);
  }
};

// As many sums as fit into registers: kDotKeys keys times kDotQueries queries.
constexpr int kDotKeys = 4;
constexpr int kDotQueries = kRegisterVectors > 2 ? 4 : 2;

// partial[query][key]: products of both, still to be summed over lanes.
template <int queries>
PREFIXCORE_INLINE void partial_dots(Vec (&partial)[kDotQueries][kLanes], const float* query, int64_t width,
                                    const float* const (&key)[kLanes], int first_key) {
  Vec total[queries][kDotKeys] = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    Vec k[kDotKeys];
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) k[j] = load(key[first_key + j] + d);
#pragma GCC unroll 4
    for (int i = 0; i < queries; ++i) {
      const Vec q = load(query + i * width + d);
#pragma GCC unroll 4
      for (int j = 0; j < kDotKeys; ++j) total[i][j] += q * k[j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < queries; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) partial[i][first_key + j] = total[i][j];
}

// scores[query][key] for `keys` keys rounded up to whole vectors, where the last key repeats.
static void dots(float* scores, const float* query, int queries, int64_t width, const MatrixView<float>& tile, int keys,
                 Prefetcher& prefetcher) {
  for (int i = 0; i < keys; i += kLanes) {
    const float* key[kLanes];
    for (int j = 0; j < kLanes; ++j) key[j] = tile.data + min(i + j, keys - 1) * tile.stride;
    for (int q = 0; q < queries; q += kDotQueries) {
      const int count = min(kDotQueries, queries - q);
      Vec partial[kDotQueries][kLanes];
      for (int j = 0; j < kLanes; j += kDotKeys) {
        prefetcher.prefetch(64);
        switch (count) {
          case 1: partial_dots<1>(partial, query + q * width, width, key, j); break;
          case 2: partial_dots<2>(partial, query + q * width, width, key, j); break;
          case 3: partial_dots<min(3, kDotQueries)>(partial, query + q * width, width, key, j); break;
          default: partial_dots<kDotQueries>(partial, query + q * width, width, key, j); break;
        }
      }
      for (int n = 0; n < count; ++n) store(scores + (q + n) * kBlockN + i, sum_rows(partial[n]));
    }
  }
}

// Updates m, l and, by alpha, acc of one query, whose scores become probabilities.
static void update_softmax(DecodeScratch& w, int query, int keys) {
  float* scores = w.scores + query * kBlockN;
  Vec highest = splat(w.m[query]);
  for (int i = 0; i < keys; i += kLanes) highest = max(load(scores + i), highest);
  float m = w.m[query];
  for (int i = 0; i < kLanes; ++i) m = max(m, highest[i]);
  Vec total{};
  for (int i = 0; i < keys; i += kLanes) {
    const Vec probability = exp2(load(scores + i) - m);
    store(scores + i, probability);
    total += probability;
  }
  if (m > w.m[query]) {
    const Vec alpha = exp2(splat(w.m[query] - m));
    float* acc = w.acc + query * w.block_dv;
    for (int64_t d = 0; d < w.block_dv; d += kLanes) store(acc + d, load(acc + d) * alpha);
    w.l[query] *= alpha[0];
    w.m[query] = m;
  }
  w.l[query] += sum(total);
}

// The queries of a block, which belong to one key/value head, against a range of keys; leaves m, l and acc.
// `visible[i]`: which keys query i sees; null: all. `mask` may be null.
static void decode_block(DecodeScratch& w, const AttentionProblem& p, const QueryBlock& block, const KeyValues& from,
                         const KeyRange& range, const KeyRange* visible, const Mask* mask) {
  pack_rows<Float32>(w.query, w.block_d, p.query, block, p.head_dim);
  for (int64_t i = 0; i < block.count * w.block_d; i += kLanes) store(w.query + i, load(w.query + i) * query_factor(p));
  for (int64_t i = 0; i < block.count * w.block_dv; i += kLanes) store(w.acc + i, Vec{});
  for (int i = 0; i < block.count; ++i) {
    w.m[i] = kLowest;
    w.l[i] = 0;
  }
  for (int64_t first_key = range.begin; first_key < range.end; first_key += kBlockN) {
    const int keys = static_cast<int>(min<int64_t>(kBlockN, range.end - first_key));
    const int padded = static_cast<int>(round_up(keys, kLanes));
    const MatrixView<float> key = float_key_rows(w.key, w.block_d, from.key, first_key, keys);
    const MatrixView<float> value = float_key_rows(w.value, w.block_dv, from.value, first_key, keys);
    prefetch_key_values(w.prefetcher, from, first_key + kBlockN, range.end);
    dots(w.scores, w.query, block.count, w.block_d, key, keys, w.prefetcher);
    for (int i = 0; i < block.count; ++i) {
      if (mask != nullptr) load_mask<1>(w.mask, *mask, block.query[i], from.key, first_key, keys);
      auto in_tile = [&](int64_t at) { return static_cast<int>(min<int64_t>(max<int64_t>(at - first_key, 0), keys)); };
      const int first = visible != nullptr ? in_tile(visible[i].begin) : 0;
      const int last = visible != nullptr ? in_tile(visible[i].end) : keys;
      finish_scores<Float32>(p, 1.0f, false, w.scores + i * kBlockN, nullptr, mask != nullptr ? w.mask : nullptr, 0,
                             padded, first, last);
      update_softmax(w, i, keys);
    }
    multiply<Float32, ALayout::rows>(block.count, w.block_dv, keys, w.scores, kBlockN, value.data, value.stride, w.acc,
                                     w.block_dv, true, w.prefetcher);
  }
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
