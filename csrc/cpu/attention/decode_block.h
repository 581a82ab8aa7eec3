// Decode, the part for few rows: a handful of queries against a long stretch of keys.
//
// With fewer rows than lanes the transposed tiles would be mostly empty, and the time goes into
// reading keys and values anyway. So here keys are the lanes: scores are dot products along the
// head, several keys and rows at a time, on keys and values where they lie if they are float32.
#pragma once

#include "forward_block.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

constexpr int kDecodeRows = 16;  // at most so many rows of a sequence and a key/value head

// Keys and values of one head, wherever they come from.
struct KeySource {
  const ConstView *key, *value;
  int64_t batch, head, start;
  KeyList list;
  const Mask* mask;  // or null
};

struct DecodeScratch {
  int64_t key_width, value_width;
  float* query;                  // [kDecodeRows, key_width], scaled
  float *key, *value;            // [kKeys, key_width], [kKeys, value_width]
  float *scores, *mask;          // [kDecodeRows, kKeys]
  float* out;                    // [kDecodeRows, value_width]
  float *maximum, *denominator;  // [kDecodeRows]
  Ahead ahead;

  DecodeScratch(const AttentionProblem& p, Carver& carve)
      : key_width(round_up(p.head_dim, kWidth)), value_width(round_up(p.value_dim, kWidth)) {
    query = carve.take<float>(kDecodeRows * key_width);
    key = carve.take<float>(kKeys * key_width);
    value = carve.take<float>(kKeys * value_width);
    scores = carve.take<float>(kDecodeRows * kKeys);
    mask = carve.take<float>(kDecodeRows * kKeys);
    out = carve.take<float>(kDecodeRows * value_width);
    maximum = carve.take<float>(kDecodeRows);
    denominator = carve.take<float>(kDecodeRows);
  }
};

// As many accumulators as fit: kDotKeys keys times `rows` rows.
constexpr int kDotKeys = 4;
constexpr int kDotRows = kBlockVectors > 2 ? 4 : 2;

// partial[row][i]: the products of query row and key i, still to be summed over lanes.
template <int rows>
PREFIXCORE_INLINE void partial_dots(Vec (&partial)[kDotRows][kWidth], const float* query, int64_t width,
                                    const float* const (&key)[kWidth], int first_key) {
  Vec total[rows][kDotKeys] = {};
  for (int64_t d = 0; d < width; d += kWidth) {
    Vec k[kDotKeys];
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) k[j] = load(key[first_key + j] + d);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Vec q = load(query + r * width + d);
#pragma GCC unroll 4
      for (int j = 0; j < kDotKeys; ++j) total[r][j] += q * k[j];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) partial[r][first_key + j] = total[r][j];
}

// scores[row][i] = query row . key i, for i < keys rounded up to kWidth (the last key repeats).
static void dots(float* scores, const float* query, int rows, int64_t width, const TileRows<float>& tile, int keys,
                 Ahead& ahead) {
  for (int i = 0; i < keys; i += kWidth) {
    const float* key[kWidth];
    for (int j = 0; j < kWidth; ++j) key[j] = tile.data + min(i + j, keys - 1) * tile.stride;
    for (int r = 0; r < rows; r += kDotRows) {
      const int count = min(kDotRows, rows - r);
      Vec partial[kDotRows][kWidth];
      for (int j = 0; j < kWidth; j += kDotKeys) {
        ahead.step(64);
        switch (count) {
          case 1: partial_dots<1>(partial, query + r * width, width, key, j); break;
          case 2: partial_dots<2>(partial, query + r * width, width, key, j); break;
          case 3: partial_dots<min(3, kDotRows)>(partial, query + r * width, width, key, j); break;
          default: partial_dots<kDotRows>(partial, query + r * width, width, key, j); break;
        }
      }
      for (int n = 0; n < count; ++n) store(scores + (r + n) * kKeys + i, sum_rows(partial[n]));
    }
  }
}

// Softcap, mask, and -infinity for the slots outside [begin, end), on one row of a tile.
static void finish_row(const AttentionProblem& p, float* scores, const float* mask, int keys, int64_t begin,
                       int64_t end) {
  for (int i = 0; i < keys; i += kWidth) {
    Vec s = load(scores + i);
    if (p.softcap > 0) s = tanh(s) * (p.softcap * kLog2e);
    if (mask != nullptr) {
      const Vec m = load(mask + i);
      s = select(m == -kInfinity, m, s + m);
    }
    if (i < begin || i + kWidth > end) {
      const VecInt slot = lane_index() + i;
      s = select((slot >= static_cast<int32_t>(begin)) & (slot < static_cast<int32_t>(end)), s, splat(-kInfinity));
    }
    store(scores + i, s);
  }
}

// The online softmax of one row: scores become probabilities.
static void absorb_row(DecodeScratch& w, int row, int keys) {
  float* scores = w.scores + row * kKeys;
  Vec highest = splat(w.maximum[row]);
  for (int i = 0; i < keys; i += kWidth) highest = max(load(scores + i), highest);
  float after = w.maximum[row];
  for (int i = 0; i < kWidth; ++i) after = max(after, highest[i]);
  Vec total{};
  for (int i = 0; i < keys; i += kWidth) {
    const Vec probability = exp2(load(scores + i) - after);
    store(scores + i, probability);
    total += probability;
  }
  if (after > w.maximum[row]) {
    const Vec shrink = exp2(splat(w.maximum[row] - after));
    for (int64_t d = 0; d < w.value_width; d += kWidth)
      store(w.out + row * w.value_width + d, load(w.out + row * w.value_width + d) * shrink);
    w.denominator[row] *= shrink[0];
    w.maximum[row] = after;
  }
  w.denominator[row] += sum(total);
}

// Rows of one sequence and head against slots [range) of a source. `visible[row]` is what each row
// may see of them, or null: everything.
static void decode_rows(DecodeScratch& w, const AttentionProblem& p, const QueryBlock& block, const KeySource& from,
                        SlotRange range, const SlotRange* visible) {
  pack_rows<Float32>(w.query, w.key_width, p.query, block, p.head_dim);
  for (int64_t i = 0; i < block.rows * w.key_width; i += kWidth)
    store(w.query + i, load(w.query + i) * query_factor(p));
  for (int64_t i = 0; i < block.rows * w.value_width; i += kWidth) store(w.out + i, Vec{});
  for (int r = 0; r < block.rows; ++r) {
    w.maximum[r] = kLowest;
    w.denominator[r] = 0;
  }
  for (int64_t slot = range.begin; slot < range.end; slot += kKeys) {
    const int keys = static_cast<int>(min<int64_t>(kKeys, range.end - slot));
    const TileRows<float> key =
        tile_rows(w.key, w.key_width, *from.key, from.batch, from.head, from.start, from.list, slot, keys, p.head_dim);
    const TileRows<float> value = tile_rows(w.value, w.value_width, *from.value, from.batch, from.head, from.start,
                                            from.list, slot, keys, p.value_dim);
    if (slot + kKeys < range.end) {
      const int64_t first = from.start + from.list[slot + kKeys];
      const int64_t last = from.start + from.list[min(slot + 2 * kKeys, range.end) - 1] + 1;
      w.ahead.add_keys(*from.key, from.batch, from.head, first, last, p.head_dim);
      w.ahead.add_keys(*from.value, from.batch, from.head, first, last, p.value_dim);
    }
    dots(w.scores, w.query, block.rows, w.key_width, key, keys, w.ahead);
    for (int r = 0; r < block.rows; ++r) {
      if (from.mask != nullptr) fill_mask_row(w.mask, block.row[r], *from.mask, from.start, from.list, slot, keys);
      const int64_t begin = visible != nullptr ? visible[r].begin - slot : 0;
      const int64_t end = visible != nullptr ? min<int64_t>(visible[r].end - slot, keys) : keys;
      finish_row(p, w.scores + r * kKeys, from.mask != nullptr ? w.mask : nullptr, keys, max<int64_t>(begin, 0),
                 max<int64_t>(end, 0));
      absorb_row(w, r, keys);
    }
    multiply<Float32, ALayout::rows>(block.rows, w.value_width, keys, w.scores, kKeys, value.data, value.stride, w.out,
                                     w.value_width, true, w.ahead);
  }
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
