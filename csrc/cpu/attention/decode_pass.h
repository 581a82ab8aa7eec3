// Decode: a few queries of each sequence over a long, shared prefix and long sequences.
//
// Every query row gets its softmax in parts that are merged at the end by their maxima and sums:
// - the prefix, split along its length. The rows of *all* sequences that name it form one block, so
//   that it is read once, not once per sequence (Juravsky et al. 2024, Hydragen);
// - the sequence, split along its length too, so that one long sequence keeps every core busy.
#pragma once

#include "decode_block.h"
#include "prefix_groups.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

class DecodePass {
 public:
  static bool fits(const AttentionProblem& p) {
    const int64_t group = p.num_heads / p.num_kv_heads;
    for (int64_t i = 0; i < p.num_sequences; ++i)
      if (p.sequences[i].query_length * group > kDecodeRows) return false;
    return true;
  }

  explicit DecodePass(const AttentionForward& p)
      : p_(p),
        group_(p.num_heads / p.num_kv_heads),
        value_width_(round_up(p.value_dim, kWidth)),
        lists_(p),
        groups_(p),
        bf16_(are_bf16(p.query, p.prefix_key, p.prefix_value)),
        tiles_(Bfloat16::kDepth > 1 && are_bf16(p.query, p.key, p.value)),
        plans_memory_(p.num_sequences * static_cast<int64_t>(sizeof(Plan))),
        units_memory_(plan() * static_cast<int64_t>(sizeof(Unit))),
        partials_(num_partials_ * partial_size() * static_cast<int64_t>(sizeof(float))) {
    list_units();
  }

  void run(const Parallel& parallel) {
    auto work = [&](const Turn& turn, char* memory) {
      const Unit& unit = units_[turn.unit];
      Carver carve(memory);
      if (unit.sequence < 0 && uses_lanes(unit.prefix)) {
        bf16_ ? run_prefix_lanes<Bfloat16>(unit, carve) : run_prefix_lanes<Float32>(unit, carve);
      } else if (unit.sequence >= 0 && tiles_) {
        run_sequence_lanes<Bfloat16>(unit, carve);
      } else {
        DecodeScratch scratch(p_, carve);
        unit.sequence < 0 ? run_prefix_rows(unit, scratch) : run_sequence(unit, scratch);
      }
    };
    for_each_unit<Bfloat16::Registers>(parallel, num_units_, scratch_bytes(), work);
    auto merge = [&](const Turn& turn, char* memory) {
      merge_rows(turn.unit / p_.num_kv_heads, turn.unit % p_.num_kv_heads, reinterpret_cast<float*>(memory));
    };
    for_each_unit(parallel, p_.num_sequences * p_.num_kv_heads, value_width_ * 4, merge);
  }

 private:
  static constexpr int64_t kUnits = 64;      // aimed at
  static constexpr int64_t kPartKeys = 256;  // and at least so many keys in each

  // How the rows of one sequence are cut: parts of its prefix, then parts of its own keys.
  struct Plan {
    int64_t prefix_parts, parts;
    int64_t first_partial;  // of kv head 0; the next head's follow
    SlotRange keys;
  };
  struct Unit {
    int64_t kv_head, part;
    int64_t sequence;           // whose keys are read; -1: those of a prefix
    int64_t prefix, first_row;  // then: which of the rows that name it come first in the block
  };

  static bool are_bf16(const ConstView& a, const ConstView& b, const ConstView& c) {
    return a.dtype == DType::bf16 && b.dtype == DType::bf16 && c.dtype == DType::bf16;
  }

  int64_t rows_of(int64_t sequence) const { return p_.sequences[sequence].query_length * group_; }
  int64_t partial_size() const { return value_width_ + kWidth; }  // output, maximum, denominator

  // Partial `part` of one row.
  float* partial(int64_t sequence, int64_t kv_head, int64_t part, int64_t row) const {
    const Plan& plan = plans_[sequence];
    const int64_t index = plan.first_partial + (kv_head * plan.parts + part) * rows_of(sequence) + row;
    return reinterpret_cast<float*>(partials_.data()) + index * partial_size();
  }

  int64_t rows_of_group(int64_t prefix) const {
    int64_t rows = 0;
    for (const int64_t* i = groups_.begin(prefix); i != groups_.end(prefix); ++i) rows += rows_of(*i);
    return rows;
  }
  // Whether the rows that name a prefix fill enough lanes to be worth a transposed block.
  bool uses_lanes(int64_t prefix) const { return rows_of_group(prefix) > kDecodeRows / 2; }

  static int64_t parts_of(int64_t keys, int64_t units) {
    return max<int64_t>(keys > 0, min(ceil_div(kUnits, max<int64_t>(units, 1)), keys / kPartKeys));
  }
  static SlotRange part_of(SlotRange keys, int64_t part, int64_t parts) {
    const int64_t tiles = ceil_div(keys.end - keys.begin, kKeys);
    return {keys.begin + tiles * part / parts * kKeys, min(keys.begin + tiles * (part + 1) / parts * kKeys, keys.end)};
  }

  // Fills the plans; returns how many units there are.
  int64_t plan() {
    plans_ = reinterpret_cast<Plan*>(plans_memory_.data());
    num_units_ = num_partials_ = 0;
    const int64_t heads = p_.num_kv_heads;
    for (int64_t prefix = -1; prefix < groups_.num_prefixes(); ++prefix) {
      if (groups_.size(prefix) == 0) continue;
      const int64_t length = prefix >= 0 ? p_.sequences[*groups_.begin(prefix)].prefix_length : 0;
      const int64_t blocks = ceil_div(rows_of_group(prefix), kLanes);
      const int64_t prefix_parts = parts_of(length, heads * blocks);
      num_units_ += heads * blocks * prefix_parts;
      for (const int64_t* i = groups_.begin(prefix); i != groups_.end(prefix); ++i) {
        const Sequence& s = p_.sequences[*i];
        Plan& plan = plans_[*i];
        plan.prefix_parts = prefix_parts;
        plan.keys = s.query_length > 0 ? visible_slots(p_, s, lists_[*i], 0, s.query_length - 1) : SlotRange{0, 0};
        const int64_t own = parts_of(plan.keys.end - plan.keys.begin, heads * p_.num_sequences);
        plan.parts = prefix_parts + own;
        plan.first_partial = num_partials_;
        num_partials_ += heads * plan.parts * rows_of(*i);
        num_units_ += heads * own;
      }
    }
    return num_units_;
  }

  void list_units() {
    units_ = reinterpret_cast<Unit*>(units_memory_.data());
    Unit* next = units_;
    const int64_t heads = p_.num_kv_heads;
    for (int64_t prefix = 0; prefix < groups_.num_prefixes(); ++prefix) {
      if (groups_.size(prefix) == 0) continue;
      const int64_t rows = rows_of_group(prefix), parts = plans_[*groups_.begin(prefix)].prefix_parts;
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t row = 0; row < rows; row += kLanes)
          for (int64_t part = 0; part < parts; ++part) *next++ = {h, part, -1, prefix, row};
    }
    for (int64_t i = 0; i < p_.num_sequences; ++i)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t part = plans_[i].prefix_parts; part < plans_[i].parts; ++part) *next++ = {h, part, i, -1, 0};
  }

  struct Owner {
    int64_t sequence, row;
  };

  // The rows that name a prefix, of one head, from unit.first_row on.
  template <class Arithmetic>
  void fill_shared(QueryBlock& block, Owner (&owner)[kLanes], const Unit& unit) const {
    int64_t place = -unit.first_row;
    for (const int64_t* i = groups_.begin(unit.prefix); i != groups_.end(unit.prefix); ++i)
      for (int64_t r = 0; r < rows_of(*i); ++r, ++place) {
        if (place < 0 || place >= kLanes) continue;
        const Sequence& s = p_.sequences[*i];
        owner[place] = {*i, r};
        block.add({s.batch, unit.kv_head * group_ + r % group_, s.query_start + r / group_}, lane_step<Arithmetic>);
      }
  }

  // As much as the unit that needs most: one call may have units of each kind.
  int64_t scratch_bytes() const {
    Carver numbers, pairs, rows;
    ForwardScratch<Float32>(p_, 0, 0, numbers);
    ForwardScratch<Bfloat16>(p_, 0, 0, pairs);
    DecodeScratch(p_, rows);
    return max(max(numbers.used(), pairs.used()), rows.used());
  }

  // A stretch of a prefix against the rows of all sequences that name it: many rows.
  template <class Arithmetic>
  void run_prefix_lanes(const Unit& unit, Carver& carve) const {
    ForwardScratch<Arithmetic> w(p_, 0, 0, carve);
    QueryBlock block;
    Owner owner[kLanes] = {};
    fill_shared<Arithmetic>(block, owner, unit);
    const KeyList list{nullptr, p_.sequences[owner[0].sequence].prefix_length};
    begin_block(w, p_, block, nullptr);
    absorb_prefix(w, p_, unit.prefix, unit.kv_head, list,
                  part_of({0, list.count}, unit.part, plans_[owner[0].sequence].prefix_parts), block.lanes);
    for (int i = 0; i < block.rows; ++i)
      write_partial(partial(owner[i].sequence, unit.kv_head, unit.part, owner[i].row), w.out + i * w.value_width,
                    w.maximum[i], w.denominator[i]);
  }

  // The same with few rows.
  void run_prefix_rows(const Unit& unit, DecodeScratch& w) const {
    QueryBlock block;
    Owner owner[kLanes];
    fill_shared<Float32>(block, owner, unit);
    const KeyList list{nullptr, p_.sequences[owner[0].sequence].prefix_length};
    const KeySource prefix{&p_.prefix_key, &p_.prefix_value, unit.prefix, unit.kv_head, 0, list, nullptr};
    decode_rows(w, p_, block, prefix, part_of({0, list.count}, unit.part, plans_[owner[0].sequence].prefix_parts),
                nullptr);
    for (int i = 0; i < block.rows; ++i)
      write_partial(partial(owner[i].sequence, unit.kv_head, unit.part, owner[i].row), w.out + i * w.value_width,
                    w.maximum[i], w.denominator[i]);
  }

  // A stretch of one sequence's keys against its own rows.
  void run_sequence(const Unit& unit, DecodeScratch& w) const {
    const Sequence& s = p_.sequences[unit.sequence];
    const Plan& plan = plans_[unit.sequence];
    const KeyList& list = lists_[unit.sequence];
    QueryBlock block;
    fill_block<Float32>(block, p_, s, unit.kv_head, 0);
    SlotRange visible[kDecodeRows];
    for (int r = 0; r < block.rows; ++r) visible[r] = visible_slots(p_, s, list, r / group_, r / group_);
    const KeySource keys{&p_.key,
                         &p_.value,
                         s.batch,
                         unit.kv_head,
                         s.key_start,
                         list,
                         p_.mask.kind == Mask::Kind::none ? nullptr : &p_.mask};
    decode_rows(w, p_, block, keys, part_of(plan.keys, unit.part - plan.prefix_parts, plan.parts - plan.prefix_parts),
                visible);
    for (int r = 0; r < block.rows; ++r)
      write_partial(partial(unit.sequence, unit.kv_head, unit.part, r), w.out + r * w.value_width, w.maximum[r],
                    w.denominator[r]);
  }

  // The same where products of tiles make up for lanes without a row.
  template <class Arithmetic>
  void run_sequence_lanes(const Unit& unit, Carver& carve) const {
    ForwardScratch<Arithmetic> w(p_, 0, 0, carve);
    const Sequence& s = p_.sequences[unit.sequence];
    const Plan& plan = plans_[unit.sequence];
    const KeyList& list = lists_[unit.sequence];
    const SlotRange range = part_of(plan.keys, unit.part - plan.prefix_parts, plan.parts - plan.prefix_parts);
    QueryBlock block;
    fill_block<Arithmetic>(block, p_, s, unit.kv_head, 0);
    begin_block(w, p_, block, nullptr);
    absorb_sequence(w, p_, block, s, unit.kv_head, list, range, 0, true,
                    [&](int64_t slot) { ask_for_keys(w.ahead, p_, s, list, unit.kv_head, slot + kKeys, range.end); });
    for (int r = 0; r < block.rows; ++r)
      write_partial(partial(unit.sequence, unit.kv_head, unit.part, r), w.out + r * w.value_width, w.maximum[r],
                    w.denominator[r]);
  }

  void write_partial(float* to, const float* out, float maximum, float denominator) const {
    for (int64_t d = 0; d < value_width_; d += kWidth) store(to + d, load(out + d));
    to[value_width_] = maximum;
    to[value_width_ + 1] = denominator;
  }

  // All parts of one sequence's rows become outputs and log-sum-exps.
  void merge_rows(int64_t sequence, int64_t kv_head, float* out) const {
    QueryBlock block;
    fill_block<Float32>(block, p_, p_.sequences[sequence], kv_head, 0);
    const int64_t parts = plans_[sequence].parts;
    for (int r = 0; r < block.rows; ++r) {
      const Row& row = block.row[r];
      const float sink = p_.sinks != nullptr ? p_.sinks[row.head] * kLog2e : -kInfinity;
      float maximum = max(sink, kLowest);
      for (int64_t n = 0; n < parts; ++n) maximum = max(maximum, partial(sequence, kv_head, n, r)[value_width_]);
      float total = exp2(splat(sink - maximum))[0];
      for (int64_t d = 0; d < value_width_; d += kWidth) store(out + d, Vec{});
      for (int64_t n = 0; n < parts; ++n) {
        const float* part = partial(sequence, kv_head, n, r);
        const float weight = exp2(splat(part[value_width_] - maximum))[0];
        total += weight * part[value_width_ + 1];
        for (int64_t d = 0; d < value_width_; d += kWidth) store(out + d, load(out + d) + load(part + d) * weight);
      }
      store_row(static_cast<char*>(p_.out.data) + row_offset(p_.out.stride, row) * size_of(p_.out.dtype), p_.out.dtype,
                out, p_.value_dim, total > 0 ? 1.0f / total : 0.0f);
      if (p_.lse != nullptr)
        p_.lse[row.batch * p_.lse_stride[0] + row.head * p_.lse_stride[1] + row.token] =
            total > 0 ? (maximum + log2(splat(total))[0]) * kLn2 : -kInfinity;
    }
  }

  const AttentionForward& p_;
  const int64_t group_, value_width_;
  const KeyLists lists_;
  const PrefixGroups groups_;
  const bool bf16_, tiles_;  // of bfloat16 are queries and prefix; queries and keys, on a CPU that multiplies tiles
  Plan* plans_ = nullptr;
  Unit* units_ = nullptr;
  int64_t num_units_ = 0, num_partials_ = 0;
  const Buffer plans_memory_, units_memory_, partials_;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
