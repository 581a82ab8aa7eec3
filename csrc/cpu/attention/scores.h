// From products of queries and keys to scores: softcap, mask, causal and window edges.
//
// Scores are kept in units of log 2 (the queries, or their products with the keys, are multiplied by
// scale * log2(e)), so that a probability is one exp2. A hidden key's score is -infinity, whatever it was before.
#pragma once

#include "tile_plan.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// What the products of queries and keys are multiplied by.
inline float query_factor(const AttentionProblem& p) { return p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e; }

// to[width x kLaneStride]: `lanes` rows of queries, `width` elements each, transposed, and scaled if that is where the
// arithmetic scales.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static void transpose_query(Element* to, const TileRows<Element>& rows, int64_t width, const AttentionProblem& p,
                            int lanes) {
  const Vec factor = splat(query_factor(p));
  transpose(reinterpret_cast<float*>(to), kLaneStride, reinterpret_cast<const float*>(rows.data), rows.stride, lanes,
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

inline int64_t mask_offset(const Mask& mask, const Row& r) {
  return r.batch * mask.stride[0] + r.head * mask.stride[1] + r.token * mask.stride[2];
}

// to[keys x kLaneStride]: what the mask adds to each score of a transposed tile.
static void fill_mask(float* to, const QueryBlock& block, const Mask& mask, int64_t start, const KeyList& list,
                      int64_t slot, int keys) {
  read_mask(mask, [&](auto read) {
    for (int lane = 0; lane < block.rows; ++lane) {
      const int64_t base = mask_offset(mask, block.row[lane]);
      for (int i = 0; i < keys; ++i)
        to[i * kLaneStride + lane] = read(base + (start + list[slot + i]) * mask.stride[3]);
    }
  });
  for (int lane = block.rows; lane < block.lanes; ++lane)
    for (int i = 0; i < keys; ++i) to[i * kLaneStride + lane] = 0;
}

// to[keys rounded up to kWidth]: the same for one row, keys side by side.
static void fill_mask_row(float* to, const Row& row, const Mask& mask, int64_t start, const KeyList& list, int64_t slot,
                          int keys) {
  read_mask(mask, [&](auto read) {
    const int64_t base = mask_offset(mask, row);
    for (int i = 0; i < keys; ++i) to[i] = read(base + (start + list[slot + i]) * mask.stride[3]);
  });
  for (int i = keys; i < round_up(keys, kWidth); ++i) to[i] = 0;
}

// In place. `slope` (or null) receives d(score)/d(product) of the softcap; `mask` may be null. Returns what the scores
// are still to be multiplied by, which is positive and costs nothing inside the exponential.
template <class Arithmetic>
static float finish_scores(const AttentionProblem& p, const TilePlan& plan, float* scores, float* slope,
                           const float* mask) {
  const float factor = Arithmetic::kScalesQuery ? 1.0f : query_factor(p);
  const bool scales = !Arithmetic::kScalesQuery && (p.softcap > 0 || mask != nullptr || factor <= 0);
  if (!scales && p.softcap <= 0 && mask == nullptr && !plan.partial) return factor;
  for (int n = 0; n < plan.num_runs; ++n) {
    const Rectangle& run = plan.run[n];
    for (int i = run.first; i < run.last; ++i) {
      float* row = scores + i * kLaneStride;
      if (p.softcap > 0) {
        for (int l = run.begin; l < run.end; l += kWidth) {
          const Vec t = tanh(Arithmetic::scaled(load(row + l), factor));
          if (slope != nullptr) store(slope + i * kLaneStride + l, 1.0f - t * t);
          store(row + l, t * (p.softcap * kLog2e));
        }
      }
      if (scales && p.softcap <= 0)
        for (int l = run.begin; l < run.end; l += kWidth) store(row + l, load(row + l) * factor);
      if (mask != nullptr) {
        for (int l = run.begin; l < run.end; l += kWidth) {
          const Vec m = load(mask + i * kLaneStride + l);
          store(row + l, select(m == -kInfinity, m, load(row + l) + m));
        }
      }
      if (plan.partial) {
        const int first = plan.first_lane[i], last = plan.last_lane[i];
        for (int l = run.begin; l < run.end; l += kWidth) {
          if (first <= l && l + kWidth <= last) continue;
          const VecInt lane = lane_index() + l;
          store(row + l, select((lane >= first) & (lane < last), load(row + l), splat(-kInfinity)));
        }
      }
    }
  }
  return scales ? 1.0f : factor;
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
