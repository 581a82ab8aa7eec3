// Backward of one tile: five products, of which the first computes the scores again.
//
// With L the log-sum-exp over prefix and sequence together and delta = <dO, O> - dL:
//   P = exp(S - L),  dV = P^T dO,  dS = scale P * (dO V^T - delta),  dK = dS^T Q,  dQ = dS K.
#pragma once

#include "../tiles/arithmetic.h"
#include "../tiles/microkernel.h"
#include "scores.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

static void fill_zero(float* to, int64_t count) {
  if (count > 0) __builtin_memset(to, 0, static_cast<size_t>(count) * sizeof(float));
}

// Which gradients are wanted.
struct Wanted {
  bool query, keys, prefix;
};

// Rows of whole vectors, `stride` floats apart, in which a gradient accumulates.
struct GradientRows {
  float* data = nullptr;
  int64_t stride = 0;

  GradientRows from(int64_t row) const { return {data + row * stride, stride}; }

  void fill_zero(int64_t first, int64_t last, int64_t width) const {
    if (stride == width) return PREFIXCORE_ISA::fill_zero(data + first * width, (last - first) * width);
    for (int64_t i = first; i < last; ++i) PREFIXCORE_ISA::fill_zero(data + i * stride, width);
  }
};

// dK and dV, a row a key. Only the first `written` rows hold numbers: what comes first to a row is stored, not added.
struct KeyGradients {
  GradientRows key, value;
  int64_t written = 0;

  // Those of one tile, which starts at row `row`.
  KeyGradients from(int64_t row) const { return {key.from(row), value.from(row), max<int64_t>(written - row, 0)}; }

  void fill_zero(int64_t first, int64_t last, int64_t block_d, int64_t block_dv) const {
    key.fill_zero(first, last, block_d);
    value.fill_zero(first, last, block_dv);
  }
};

template <class Arithmetic>
struct BackwardScratch {
  using Element = typename Arithmetic::Element;
  int64_t block_d, block_dv;                                // D and Dv in whole vectors of numbers
  int64_t elements_d, elements_dv;                          // and of elements
  float *query_buffer, *grad_out_buffer;                    // [kBlockM, block_d], [kBlockM, block_dv]: rows
  Element *query_t, *grad_out_t;                            // [elements_d, kTileStride], ...: transposed
  Element *query_columns_buffer, *grad_out_columns_buffer;  // [kBlockM / kPack, block_d], ..., if columns are packed
  MatrixView<Element> query_columns, grad_out_columns;      // there, or the rows
  float* grad_query_buffer;                                 // [kBlockM, block_d]
  GradientRows grad_query;                                  // there, or in place
  PackedTiles<Element> packed_prefix_keys, packed_prefix_values, packed_keys, packed_values;  // rows
  Element* key_columns_buffer;                 // [kBlockN / kPack, block_d], if columns are packed
  MatrixView<Element> k, v, k_columns;         // the tile at hand
  float *probability, *grad_score;             // [kBlockN, kTileStride]: P and dS
  Element* grad_score_columns;                 // [kBlockN / kPack, kTileStride], if columns are packed
  float *slope, *mask;                         // [kBlockN, kTileStride], of softcap and mask
  float *lse, *delta;                          // [kBlockM], lse in units of log 2
  float *grad_key, *grad_value;                // [keys, block_d], ...: of a sequence that is one chunk
  float *grad_prefix_key, *grad_prefix_value;  // [P, block_d], ...: of a prefix that is one group of chunks
  TilePlan plan;
  Prefetcher prefetcher;

  // `most_keys`: that a chunk sees; `gradient_rows`: of its keys' gradients, if they accumulate in scratch.
  BackwardScratch(const AttentionProblem& p, const Wanted& wanted, int64_t most_keys, int64_t gradient_rows,
                  Arena& arena)
      : block_d(round_up(p.head_dim, kLanes)),
        block_dv(round_up(p.value_dim, kLanes)),
        elements_d(padded_elements<Arithmetic>(p.head_dim)),
        elements_dv(padded_elements<Arithmetic>(p.value_dim)),
        packed_prefix_keys(packed_rows(p, p.prefix_capacity, elements_d, p.head_dim, arena)),
        packed_prefix_values(packed_rows(p, p.prefix_capacity, elements_dv, p.value_dim, arena)),
        packed_keys(packed_rows(p, most_keys, elements_d, p.head_dim, arena)),
        packed_values(packed_rows(p, most_keys, elements_dv, p.value_dim, arena)) {
    constexpr int64_t kPack = Arithmetic::kPack;
    query_buffer = arena.allocate<float>(kBlockM * block_d);
    grad_out_buffer = arena.allocate<float>(kBlockM * block_dv);
    query_t = arena.allocate<Element>(elements_d * kTileStride);
    grad_out_t = arena.allocate<Element>(elements_dv * kTileStride);
    grad_query_buffer = arena.allocate<float>(kBlockM * block_d);
    probability = arena.allocate<float>(kBlockN * kTileStride);
    grad_score = arena.allocate<float>(kBlockN * kTileStride);
    query_columns_buffer = arena.allocate<Element>(kPack > 1 ? kBlockM / kPack * block_d : 0);
    grad_out_columns_buffer = arena.allocate<Element>(kPack > 1 ? kBlockM / kPack * block_dv : 0);
    key_columns_buffer = arena.allocate<Element>(kPack > 1 ? kBlockN / kPack * block_d : 0);
    grad_score_columns = arena.allocate<Element>(kPack > 1 ? kBlockN / kPack * kTileStride : 0);
    slope = arena.allocate<float>(p.softcap > 0 ? kBlockN * kTileStride : 0);
    mask = arena.allocate<float>(p.mask.kind == Mask::Kind::none ? 0 : kBlockN * kTileStride);
    lse = arena.allocate<float>(kBlockM);
    delta = arena.allocate<float>(kBlockM);
    grad_key = arena.allocate<float>(wanted.keys ? gradient_rows * block_d : 0);
    grad_value = arena.allocate<float>(wanted.keys ? gradient_rows * block_dv : 0);
    grad_prefix_key = arena.allocate<float>(wanted.prefix ? p.prefix_capacity * block_d : 0);
    grad_prefix_value = arena.allocate<float>(wanted.prefix ? p.prefix_capacity * block_dv : 0);
  }

 private:
  static PackedTiles<Element> packed_rows(const AttentionProblem& p, int64_t keys, int64_t width, int64_t dim,
                                          Arena& arena) {
    return {keys_to_pack(p, keys), width, ceil_div(dim, Arithmetic::kPack), 1, arena};
  }
};

// `rows` rows of a gradient from `at` on, if rows of `width` floats that are near each other can accumulate there, else
// `buffer`.
static GradientRows in_place_or(float* buffer, const View& gradient, const TokenIndex& at, int64_t rows, int64_t dim,
                                int64_t width) {
  const int64_t stride = gradient.stride[2];
  const bool near = stride == width || rows <= kScatteredRows;
  if (gradient.dtype != DType::f32 || dim != width || !near) return {buffer, width};
  return {static_cast<float*>(gradient.data) + token_offset(gradient.stride, at), stride};
}

// Loads what a block's queries bring to every tile.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static void begin_block(BackwardScratch<Arithmetic>& w, const AttentionBackwardProblem& p, const QueryBlock& block) {
  const auto query_rows =
      load_rows<Arithmetic>(reinterpret_cast<Element*>(w.query_buffer), w.elements_d, p.query, block, p.head_dim);
  transpose_queries<Arithmetic>(w.query_t, query_rows, w.elements_d, p, block.padded);
  w.query_columns = Arithmetic::columns(w.query_columns_buffer, w.block_d, query_rows, block.padded);

  const auto grad_out_rows = load_rows<Arithmetic>(reinterpret_cast<Element*>(w.grad_out_buffer), w.elements_dv,
                                                   p.grad_out, block, p.value_dim);
  const auto out_rows = load_rows<Arithmetic>(w.grad_out_t, w.elements_dv, p.out, block, p.value_dim);
  row_dots<Arithmetic>(w.delta, out_rows, grad_out_rows, w.elements_dv, block.padded);
  transpose(reinterpret_cast<float*>(w.grad_out_t), kTileStride, reinterpret_cast<const float*>(grad_out_rows.data),
            grad_out_rows.stride, block.padded, w.elements_dv, nullptr);
  w.grad_out_columns = Arithmetic::columns(w.grad_out_columns_buffer, w.block_dv, grad_out_rows, block.padded);
  w.grad_query = {w.grad_query_buffer, w.block_d};
  if (p.grad_query.data != nullptr && p.num_heads == p.num_kv_heads && block.count > 0)
    w.grad_query = in_place_or(w.grad_query_buffer, p.grad_query, block.query[0], block.count, p.head_dim, w.block_d);
  for (int i = 0; i < kBlockM; ++i) {
    w.lse[i] = kInfinity;  // every probability becomes 0: of padding, and of queries that see nothing
    if (i >= block.count) continue;
    const int64_t at = lse_offset(p.lse_stride, block.query[i]);
    if (p.lse[at] != -kInfinity) w.lse[i] = p.lse[at] * kLog2e;
    if (p.grad_lse != nullptr) w.delta[i] -= p.grad_lse[at];
    w.delta[i] *= p.scale;
  }
}

// How many rows of a tile's dK and dV its products are added to; all later rows they are stored to. Where the products
// do not cover all later rows, those are zeroed first and everything is added.
template <class Arithmetic>
static int64_t rows_to_add_to(const BackwardScratch<Arithmetic>& w, const KeyGradients& gradients, int64_t keys) {
  int64_t covered = gradients.written;
  for (int n = 0; n < w.plan.num_runs; ++n)
    if (w.plan.run[n].key_begin == covered) covered = w.plan.run[n].key_end;
  if (covered >= keys) return gradients.written;
  gradients.fill_zero(gradients.written, keys, w.block_d, w.block_dv);
  return keys;
}

// S = K Q^T and dP = V dO^T, where the plan has runs.
template <class Arithmetic>
static void score_products(BackwardScratch<Arithmetic>& w, const AttentionBackwardProblem& p) {
  for (int n = 0; n < w.plan.num_runs; ++n) {
    const Rectangle& run = w.plan.run[n];
    const int64_t place = run.key_begin * kTileStride + run.query_begin;
    multiply<Arithmetic, ALayout::rows>(run.keys(), run.queries(), product_depth<Arithmetic>(p.head_dim),
                                        w.k.data + run.key_begin * w.k.stride, w.k.stride, w.query_t + run.query_begin,
                                        kTileStride, w.probability + place, kTileStride, false, w.prefetcher);
    multiply<Arithmetic, ALayout::rows>(run.keys(), run.queries(), product_depth<Arithmetic>(p.value_dim),
                                        w.v.data + run.key_begin * w.v.stride, w.v.stride,
                                        w.grad_out_t + run.query_begin, kTileStride, w.grad_score + place, kTileStride,
                                        false, w.prefetcher);
  }
}

// Where P and dS lie as elements: they take the place of what they come from, as rows; with pairs a row takes half its
// room, and the columns of dS lie elsewhere.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static Element* probability_rows(BackwardScratch<Arithmetic>& w) {
  return reinterpret_cast<Element*>(w.probability);
}
template <class Arithmetic, class Element = typename Arithmetic::Element>
static Element* grad_score_rows(BackwardScratch<Arithmetic>& w) {
  return reinterpret_cast<Element*>(w.grad_score);
}
template <class Arithmetic, class Element = typename Arithmetic::Element>
static Element* grad_score_columns(BackwardScratch<Arithmetic>& w) {
  return Arithmetic::kPack > 1 ? w.grad_score_columns : grad_score_rows(w);
}

// P = 2^(S - L) and dS = P * (scale dP - delta), by the softcap's slope. S lacks `factor`; delta has the scale in it.
template <class Arithmetic>
static void score_gradients(BackwardScratch<Arithmetic>& w, const AttentionBackwardProblem& p, float factor) {
  constexpr int kPack = Arithmetic::kPack;
  // Local copies: the stores below might, as far as the compiler knows, change those in `w`.
  const float *score = w.probability, *grad_probability = w.grad_score, *slope = p.softcap > 0 ? w.slope : nullptr;
  auto *probability_to = probability_rows(w), *grad_score_to = grad_score_rows(w), *columns_to = grad_score_columns(w);
  const float scale = p.scale;
  for (int n = 0; n < w.plan.num_runs; ++n) {
    const Rectangle run = w.plan.run[n];
    const int end = run.key_begin + kPack * static_cast<int>(product_depth<Arithmetic>(run.keys()));
    for (int m = run.query_begin; m < run.query_end; m += kLanes) {
      const Vec lse = load(w.lse + m), delta = load(w.delta + m);
      for (int i = run.key_begin; i < end; i += kPack) {
        Vec probability[kPack] = {}, grad[kPack] = {};
        for (int k = 0; k < kPack && i + k < run.key_end; ++k) {
          const int64_t place = (i + k) * kTileStride + m;
          probability[k] = Arithmetic::exp2(Arithmetic::scaled(load(score + place), factor) - lse);
          grad[k] = probability[k] * (load(grad_probability + place) * scale - delta);
          if (slope != nullptr) grad[k] *= load(slope + place);
        }
        const int64_t place = i * kTileStride + m / kPack;
        const auto rounded = Arithmetic::round(grad);
        Arithmetic::store_rows(probability_to + place, kTileStride, Arithmetic::round(probability));
        Arithmetic::store_rows(grad_score_to + place, kTileStride, rounded);
        if constexpr (kPack > 1) Arithmetic::store_columns(columns_to + i / kPack * kTileStride + m, rounded);
      }
    }
  }
}

// dQ += dS K, for `queries` queries; before the `first` tile dQ holds no numbers.
template <class Arithmetic>
static void add_query_gradient(BackwardScratch<Arithmetic>& w, int queries, bool first) {
  constexpr int kPack = Arithmetic::kPack;
  int query = 0;
  for (int n = 0; n < w.plan.num_strips; ++n) {
    const Rectangle& strip = w.plan.strip[n];
    const int64_t step = strip.key_begin / kPack;
    if (first) w.grad_query.fill_zero(query, strip.query_begin, w.block_d);
    query = min(strip.query_end, queries);
    multiply<Arithmetic, ALayout::columns>(
        query - strip.query_begin, w.block_d, product_depth<Arithmetic>(strip.keys()),
        grad_score_columns(w) + step * kTileStride + strip.query_begin, kTileStride,
        w.k_columns.data + step * w.k_columns.stride, w.k_columns.stride, w.grad_query.from(strip.query_begin).data,
        w.grad_query.stride, !first, w.prefetcher);
  }
  if (first) w.grad_query.fill_zero(query, queries, w.block_d);
}

// dV += P^T dO and dK += dS^T Q, for the `keys` keys of the tile.
template <class Arithmetic>
static void add_key_gradients(BackwardScratch<Arithmetic>& w, const KeyGradients& gradients, int64_t keys) {
  constexpr int kPack = Arithmetic::kPack;
  const int64_t added_to = rows_to_add_to(w, gradients, keys);
  for (int n = 0; n < w.plan.num_runs; ++n) {
    const Rectangle& run = w.plan.run[n];
    const int64_t place = run.key_begin * kTileStride + run.query_begin / kPack, step = run.query_begin / kPack;
    const GradientRows value = gradients.value.from(run.key_begin), key = gradients.key.from(run.key_begin);
    const bool adds = run.key_begin < added_to;
    multiply<Arithmetic, ALayout::rows>(run.keys(), w.block_dv, run.queries() / kPack, probability_rows(w) + place,
                                        kTileStride, w.grad_out_columns.data + step * w.grad_out_columns.stride,
                                        w.grad_out_columns.stride, value.data, value.stride, adds, w.prefetcher);
    multiply<Arithmetic, ALayout::rows>(run.keys(), w.block_d, run.queries() / kPack, grad_score_rows(w) + place,
                                        kTileStride, w.query_columns.data + step * w.query_columns.stride,
                                        w.query_columns.stride, key.data, key.stride, adds, w.prefetcher);
  }
}

// The tile w.k, w.v of `keys` keys, seen by `queries` queries. Its gradients are added to w.grad_query if
// `wants_query`, and to `gradients`, of the tile's keys, if that is not null.
template <class Arithmetic>
static void backward_tile(BackwardScratch<Arithmetic>& w, const AttentionBackwardProblem& p, bool wants_query,
                          bool first, const float* mask, int queries, int64_t keys, const KeyGradients* gradients) {
  score_products(w, p);
  const float factor = finish_score_tile<Arithmetic>(p, w.plan, w.probability, w.slope, mask);
  score_gradients(w, p, factor);
  if (wants_query) add_query_gradient(w, queries, first);
  if (gradients != nullptr) add_key_gradients(w, *gradients, keys);
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
