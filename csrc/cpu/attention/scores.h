// From products of queries and keys to scores: scale, softcap, mask, causal and window edges. Everything that an option
// of the op does to a score is here, once, for forward, backward and decode.
//
// Scores are in units of log 2 (the queries, or their products with the keys, are multiplied by scale * log2(e)), so
// that a probability is one exp2. A hidden key's score is -infinity, whatever it was before.
#pragma once

#include "tile_plan.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// What the products of queries and keys are multiplied by.
inline float query_factor(const AttentionProblem& p) { return p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e; }

// to[width x kTileStride]: `queries` matrix rows of `width` elements, transposed, and scaled if the arithmetic scales
// queries.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static void transpose_queries(Element* to, const MatrixView<Element>& rows, int64_t width, const AttentionProblem& p,
                              int queries) {
  const Vec factor = splat(query_factor(p));
  transpose(reinterpret_cast<float*>(to), kTileStride, reinterpret_cast<const float*>(rows.data), rows.stride, queries,
            width, Arithmetic::kScalesQuery ? &factor : nullptr);
}

// Additive masks at or below this hide the key: libraries write "minus infinity" as the lowest
// finite number, beside which a log-sum-exp would have no digits left.
constexpr float kHidden = -1e30f;

// Calls use(read), where read(offset) is what one element of the mask adds to a score.
template <class Use>
PREFIXCORE_INLINE void read_mask(const Mask& mask, Use use) {
  auto scaled = [](float x) { return x <= kHidden ? -kInfinity : x * kLog2e; };
  if (mask.kind == Mask::Kind::boolean) {
    const auto* data = static_cast<const uint8_t*>(mask.data);
    use([=](int64_t i) { return data[i] != 0 ? 0.0f : -kInfinity; });
  } else if (mask.dtype == DType::f32) {
    const auto* data = static_cast<const float*>(mask.data);
    use([=](int64_t i) { return scaled(data[i]); });
  } else {
    const auto* data = static_cast<const uint16_t*>(mask.data);
    const bool bf16 = mask.dtype == DType::bf16;
    use([=](int64_t i) {
      const VecHalf x{data[i]};
      return scaled((bf16 ? from_bf16(x) : from_f16(x))[0]);
    });
  }
}

// to[i * step]: what the mask adds to the scores of one query and `count` keys from `first` on.
template <int step>
static void load_mask(float* to, const Mask& mask, const TokenIndex& query, const HeadKeys& keys, int64_t first,
                      int count) {
  const int64_t base = query.batch * mask.stride[0] + query.head * mask.stride[1] + query.token * mask.stride[2];
  read_mask(mask, [&](auto read) {
    for (int i = 0; i < count; ++i) to[i * step] = read(base + (keys.start + keys.list[first + i]) * mask.stride[3]);
  });
}

// to[count x kTileStride]: the same for a tile, 0 for queries that the block lacks.
static void load_mask_tile(float* to, const Mask& mask, const QueryBlock& block, const HeadKeys& keys, int64_t first,
                           int count) {
  for (int m = 0; m < block.count; ++m) load_mask<kTileStride>(to + m, mask, block.query[m], keys, first, count);
  for (int m = block.count; m < block.padded; ++m)
    for (int i = 0; i < count; ++i) to[i * kTileStride + m] = 0;
}

// Softcap of numbers [begin, end). Out of line, so that forward, backward and decode run the same instructions:
// inlined, the compiler fuses multiplications and additions differently here and there, and scores would differ in the
// last bit.
template <class Arithmetic>
__attribute__((noinline)) static void cap_scores(float* scores, float* slope, int begin, int end, float factor,
                                                 float softcap) {
  for (int i = begin; i < end; i += kLanes) {
    const Vec t = tanh(Arithmetic::scaled(load(scores + i), factor));
    if (slope != nullptr) store(slope + i, 1.0f - t * t);
    store(scores + i, t * (softcap * kLog2e));
  }
}

// Products that lie side by side become scores, in place: numbers [begin, end), whole vectors, of which [first, last)
// are visible. In a tile they are one key's, of many queries; in decode one query's, of many keys.
//
// Products that come with `scales` are multiplied by `factor`, others have it in them. `slope` (or null) receives
// d(score)/d(product) of the softcap. `mask` (or null) is added.
template <class Arithmetic>
PREFIXCORE_INLINE void finish_scores(const AttentionProblem& p, float factor, bool scales, float* scores, float* slope,
                                     const float* mask, int begin, int end, int first, int last) {
  if (p.softcap > 0) {
    cap_scores<Arithmetic>(scores, slope, begin, end, factor, p.softcap);
  } else if (scales) {
    for (int i = begin; i < end; i += kLanes) store(scores + i, load(scores + i) * factor);
  }
  if (mask != nullptr) {
    for (int i = begin; i < end; i += kLanes) {
      const Vec m = load(mask + i);
      store(scores + i, select(m == -kInfinity, m, load(scores + i) + m));
    }
  }
  if (first <= begin && end <= last) return;
  for (int i = begin; i < end; i += kLanes) {
    if (first <= i && i + kLanes <= last) continue;
    const VecInt place = lane_index() + i;
    store(scores + i, select((place >= first) & (place < last), load(scores + i), splat(-kInfinity)));
  }
}

// The same for a tile. Returns what the scores are still to be multiplied by, which is positive and costs nothing
// inside the exponential: without softcap and mask there is no other reason to go through the tile.
template <class Arithmetic>
static float finish_score_tile(const AttentionProblem& p, const TilePlan& plan, float* scores, float* slope,
                               const float* mask) {
  const float factor = Arithmetic::kScalesQuery ? 1.0f : query_factor(p);
  const bool scales = !Arithmetic::kScalesQuery && (p.softcap > 0 || mask != nullptr || factor <= 0);
  if (!scales && p.softcap <= 0 && mask == nullptr && !plan.has_edges) return factor;
  for (int n = 0; n < plan.num_runs; ++n) {
    const Rectangle& run = plan.run[n];
    for (int i = run.key_begin; i < run.key_end; ++i) {
      const int64_t row = i * kTileStride;
      finish_scores<Arithmetic>(p, factor, scales, scores + row, slope != nullptr ? slope + row : nullptr,
                                mask != nullptr ? mask + row : nullptr, run.query_begin, run.query_end,
                                plan.has_edges ? plan.first_query[i] : 0,
                                plan.has_edges ? plan.last_query[i] : kBlockM);
    }
  }
  return scales ? 1.0f : factor;
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
