// The plan of a tile: which of its queries see which of its keys.
//
// The plan cuts what is seen into rectangles, in two ways: *runs*, consecutive keys that the same queries see, and
// *strips*, consecutive queries that see the same keys. A tile inside the causal triangle is one of either; on the
// diagonal, keys that only the later queries see form shorter runs, and the products skip the rest. A product that sums
// over keys goes strip by strip, any other run by run: then each number of its result is written once.
#pragma once

#include "../tiles/tile.h"
#include "operands.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// Keys and queries of a tile, queries in whole steps.
struct Rectangle {
  int key_begin, key_end;
  int query_begin, query_end;

  int keys() const { return key_end - key_begin; }
  int queries() const { return query_end - query_begin; }
};

struct TilePlan {
  int num_runs = 0, num_strips = 0;
  bool has_edges = false;  // some key is hidden from some query of its run
  Rectangle strip[kBlockM / kQueryStep], run[2 * kBlockM / kQueryStep];
  int first_query[kBlockN], last_query[kBlockN];  // key i is seen by queries [first_query, last_query), if has_edges
};

// Every query sees every key, as those of a prefix.
static void plan_full_tile(TilePlan& plan, int keys, int queries) {
  plan.num_runs = plan.num_strips = keys > 0 && queries > 0;
  plan.has_edges = false;
  plan.run[0] = plan.strip[0] = {0, keys, 0, queries};
}

// The runs of a plan that has its strips. A later query's keys never begin, or end, before an earlier query's.
static void plan_runs(TilePlan& plan) {
  plan.num_runs = 0;
  for (int at = 0;;) {
    Rectangle run{kBlockN, kBlockN, kBlockM, 0};  // begins where a strip goes on, and ends where one begins or ends
    for (int n = 0; n < plan.num_strips; ++n)
      if (plan.strip[n].key_end > at) run.key_begin = min(run.key_begin, max(plan.strip[n].key_begin, at));
    if (run.key_begin == kBlockN) return;
    for (int n = 0; n < plan.num_strips; ++n) {
      const Rectangle& strip = plan.strip[n];
      if (strip.key_end <= run.key_begin) continue;
      run.key_end = min(run.key_end, strip.key_begin > run.key_begin ? strip.key_begin : strip.key_end);
      if (strip.key_begin > run.key_begin) continue;
      run.query_begin = min(run.query_begin, strip.query_begin);
      run.query_end = strip.query_end;
    }
    plan.run[plan.num_runs++] = run;
    at = run.key_end;
  }
}

// How many of the numbers are below `bound`.
PREFIXCORE_INLINE int count_below(const int (&numbers)[kBlockN], int count, int bound) {
  int below = 0;
  for (int i = 0; i < count; ++i) below += numbers[i] < bound;
  return below;
}

// Keys [first_key, first_key + keys) of a sequence against the `queries` queries, whole steps of them, from
// `first_query` on. Runs and strips begin at whole steps of keys, and end at one or with the tile.
template <class Arithmetic>
static void plan_sequence_tile(TilePlan& plan, const AttentionProblem& p, const Sequence& s, const KeyList& list,
                               int64_t first_key, int keys, int64_t first_query, int queries) {
  constexpr int kKeyStep = key_step<Arithmetic>, kStep = query_step<Arithmetic>;
  const int64_t group = group_size(p), shift = s.key_length - s.query_length;
  plan_full_tile(plan, keys, queries);
  if (keys == 0) return;
  // The first query of the block that stands where a key does, if the block went on in both directions.
  auto query_at = [&](int64_t position) { return (position - shift) * group - first_query; };
  const int64_t window = min(p.sliding_window, s.key_length + s.query_length) * group;  // in queries
  const bool cut_below = p.causal && query_at(list[first_key + keys - 1]) > 0;
  const bool cut_above = window > 0 && query_at(list[first_key]) + window < queries;
  if (!cut_below && !cut_above) return;
  auto clamped = [&](int64_t query) { return static_cast<int>(min<int64_t>(max<int64_t>(query, 0), queries)); };
  auto fill = [&](auto position) {
    for (int i = 0; i < keys; ++i) plan.first_query[i] = cut_below ? clamped(query_at(position(i))) : 0;
    for (int i = 0; i < keys; ++i) plan.last_query[i] = cut_above ? clamped(query_at(position(i)) + window) : queries;
  };
  if (list.position == nullptr)
    fill([=](int i) { return first_key + i; });
  else
    fill([&](int i) { return static_cast<int64_t>(list.position[first_key + i]); });

  plan.has_edges = true;
  plan.num_strips = 0;
  for (int query = 0; query < queries; query += kStep) {
    int begin = count_below(plan.last_query, keys, query + 1), end = count_below(plan.first_query, keys, query + kStep);
    if (begin >= end) continue;
    begin = begin / kKeyStep * kKeyStep;
    end = min(static_cast<int>(round_up(end, kKeyStep)), keys);
    Rectangle* before = plan.num_strips > 0 ? &plan.strip[plan.num_strips - 1] : nullptr;
    if (before != nullptr && before->query_end == query && before->key_begin == begin && before->key_end == end)
      before->query_end += kStep;
    else
      plan.strip[plan.num_strips++] = {begin, end, query, query + kStep};
  }
  plan_runs(plan);
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
