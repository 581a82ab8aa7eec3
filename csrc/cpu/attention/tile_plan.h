// A tile of keys and values as float32, and the plan of which lanes see which of its keys.
//
// float32 keys without padding are read where they lie; everything else is packed into float32 rows
// first, so that every dtype, stride and padding shares one microkernel. The plan cuts what is seen of a tile into
// rectangles, in two ways: runs, consecutive keys that the same lanes see, and strips, consecutive lanes that see the
// same keys. A tile inside the causal triangle is one of either; on the diagonal, keys that only the later lanes see
// form shorter runs, and the products skip the rest. A product that sums over keys goes strip by strip, any other run
// by run: then each number of its result is written once.
#pragma once

#include "../tiles/prefetch.h"
#include "visible_keys.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

constexpr int kKeys = 96;

struct Rectangle {
  int first, last;  // keys of the tile
  int begin, end;   // lanes, whole steps
};

struct TilePlan {
  int num_runs = 0, num_strips = 0;
  bool partial = false;  // some key is hidden from some lane inside its run
  Rectangle strip[kLanes / kLaneStep], run[2 * kLanes / kLaneStep];
  int first_lane[kKeys], last_lane[kKeys];  // key i is seen by lanes [first_lane, last_lane)
};

// Every lane sees every key: the prefix.
static void plan_whole(TilePlan& plan, int keys, int lanes) {
  plan.num_runs = plan.num_strips = keys > 0 && lanes > 0;
  plan.partial = false;
  plan.run[0] = plan.strip[0] = {0, keys, 0, lanes};
}

// The runs of a plan that has its strips. Neither end of what a lane sees lies before that of an earlier lane.
static void plan_runs(TilePlan& plan) {
  plan.num_runs = 0;
  for (int at = 0;;) {
    Rectangle run{kKeys, kKeys, kLanes, 0};  // begins where a strip goes on, and ends where one begins or ends
    for (int n = 0; n < plan.num_strips; ++n)
      if (plan.strip[n].last > at) run.first = min(run.first, max(plan.strip[n].first, at));
    if (run.first == kKeys) return;
    for (int n = 0; n < plan.num_strips; ++n) {
      const Rectangle& strip = plan.strip[n];
      if (strip.last <= run.first) continue;
      run.last = min(run.last, strip.first > run.first ? strip.first : strip.last);
      if (strip.first > run.first) continue;
      run.begin = min(run.begin, strip.begin);
      run.end = strip.end;
    }
    plan.run[plan.num_runs++] = run;
    at = run.last;
  }
}

// How many of the numbers are below `bound`.
PREFIXCORE_INLINE int count_below(const int (&numbers)[kKeys], int count, int bound) {
  int below = 0;
  for (int i = 0; i < count; ++i) below += numbers[i] < bound;
  return below;
}

// `first_row`: the row of the sequence that lane 0 holds; the tile's keys are slots `slot` and on. Runs and strips
// begin at whole steps of keys, and end at one or with the tile.
template <class Arithmetic>
static void plan_sequence(TilePlan& plan, const AttentionProblem& p, const Sequence& s, const KeyList& list,
                          int64_t slot, int keys, int64_t first_row, int lanes) {
  constexpr int kKeyStep = key_step<Arithmetic>, kStep = lane_step<Arithmetic>;
  const int64_t group = p.num_heads / p.num_kv_heads, shift = s.key_length - s.query_length;
  plan_whole(plan, keys, lanes);
  if (keys == 0) return;
  // The lane whose query stands where a key does, of a block that had all lanes.
  auto lane_of = [&](int64_t position) { return (position - shift) * group - first_row; };
  const int64_t window = min(p.sliding_window, s.key_length + s.query_length) * group;  // as many lanes
  const bool cut_below = p.causal && lane_of(list[slot + keys - 1]) > 0;
  const bool cut_above = window > 0 && lane_of(list[slot]) + window < lanes;
  if (!cut_below && !cut_above) return;
  auto clamped = [&](int64_t lane) { return static_cast<int>(min<int64_t>(max<int64_t>(lane, 0), lanes)); };
  auto fill = [&](auto position) {
    for (int i = 0; i < keys; ++i) plan.first_lane[i] = cut_below ? clamped(lane_of(position(i))) : 0;
    for (int i = 0; i < keys; ++i) plan.last_lane[i] = cut_above ? clamped(lane_of(position(i)) + window) : lanes;
  };
  if (list.position == nullptr)
    fill([=](int i) { return slot + i; });
  else
    fill([&](int i) { return static_cast<int64_t>(list.position[slot + i]); });

  plan.partial = true;
  plan.num_strips = 0;
  for (int lane = 0; lane < lanes; lane += kStep) {
    int first = count_below(plan.last_lane, keys, lane + 1), last = count_below(plan.first_lane, keys, lane + kStep);
    if (first >= last) continue;
    first = first / kKeyStep * kKeyStep;
    last = min(static_cast<int>(round_up(last, kKeyStep)), keys);
    Rectangle* before = plan.num_strips > 0 ? &plan.strip[plan.num_strips - 1] : nullptr;
    if (before != nullptr && before->end == lane && before->first == first && before->last == last)
      before->end += kStep;
    else
      plan.strip[plan.num_strips++] = {first, last, lane, lane + kStep};
  }
  plan_runs(plan);
}

template <DType dtype>
static void load_keys(float* to, int64_t width, const char* from, int64_t row_stride, const KeyList& list, int64_t slot,
                      int keys, int64_t count) {
  for (int i = 0; i < keys; ++i)
    load_row<dtype>(to + i * width, from + list[slot + i] * row_stride * size_of(dtype), count, width);
}

// to[keys x width] from rows of `view` at [batch, head, start + position of each slot].
static void load_keys(float* to, int64_t width, const ConstView& view, int64_t batch, int64_t head, int64_t start,
                      const KeyList& list, int64_t slot, int keys, int64_t count) {
  const int64_t stride = view.stride[2];
  const char* from = static_cast<const char*>(view.data) +
                     (batch * view.stride[0] + head * view.stride[1] + start * stride) * size_of(view.dtype);
  switch (view.dtype) {
    case DType::f32: return load_keys<DType::f32>(to, width, from, stride, list, slot, keys, count);
    case DType::bf16: return load_keys<DType::bf16>(to, width, from, stride, list, slot, keys, count);
    case DType::f16: return load_keys<DType::f16>(to, width, from, stride, list, slot, keys, count);
  }
}

// In place if rows are whole vectors of float32, else packed into `room` [keys x width].
static TileRows<float> tile_rows(float* room, int64_t width, const ConstView& view, int64_t batch, int64_t head,
                                 int64_t start, const KeyList& list, int64_t slot, int keys, int64_t count) {
  if (count == width && view.dtype == DType::f32 && list.position == nullptr)
    return {static_cast<const float*>(view.data) + row_offset(view.stride, {batch, head, start + slot}),
            view.stride[2]};
  load_keys(room, width, view, batch, head, start, list, slot, keys, count);
  return {room, width};
}

// Asks for the keys, or values, of the tile that starts at `slot`.
static void ask_for_rows(Ahead& ahead, const ConstView& view, int64_t width, const Sequence& s, const KeyList& list,
                         int64_t kv_head, int64_t slot, int64_t end) {
  if (slot >= end) return;
  const int64_t first = s.key_start + list[slot], last = s.key_start + list[min(slot + kKeys, end) - 1] + 1;
  ahead.add_keys(view, s.batch, kv_head, first, last, width);
}

// Asks for both.
static void ask_for_keys(Ahead& ahead, const AttentionProblem& p, const Sequence& s, const KeyList& list,
                         int64_t kv_head, int64_t slot, int64_t end) {
  ask_for_rows(ahead, p.key, p.head_dim, s, list, kv_head, slot, end);
  ask_for_rows(ahead, p.value, p.value_dim, s, list, kv_head, slot, end);
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
