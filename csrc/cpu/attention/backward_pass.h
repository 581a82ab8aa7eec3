// The whole backward pass: units in parallel, then the sums that several units share.
#pragma once

#include "backward_reduce.h"
#include "backward_schedule.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

template <class Arithmetic>
class BackwardPass {
 public:
  explicit BackwardPass(const AttentionBackward& p)
      : p_(p),
        wanted_{p.grad_query.data != nullptr, p.grad_key.data != nullptr,
                p.grad_prefix_key != nullptr && p.num_prefixes * p.prefix_capacity > 0},
        key_width_(round_up(p.head_dim, kWidth)),
        value_width_(round_up(p.value_dim, kWidth)),
        prefix_size_(wanted_.prefix ? p.prefix_capacity * (key_width_ + value_width_) : 0),
        lists_(p),
        schedule_(p, lists_, wanted_.keys, wanted_.prefix, prefix_size_ * kFloat),
        partials_(p.num_kv_heads * schedule_.partial_rows * (key_width_ + value_width_) * kFloat),
        buffers_(p.num_kv_heads * schedule_.num_buffers * prefix_size_ * kFloat) {}

  void run(const Parallel& parallel) {
    const int64_t heads = p_.num_kv_heads;
    Carver measure;
    BackwardScratch<Arithmetic>(p_, wanted_, schedule_.most_keys, schedule_.scratch_rows, measure);
    // Later parts of a sequence are the longest with causal attention: they go first.
    const int64_t last = schedule_.num_slots * heads - 1;
    auto first_block = [&](int64_t unit) {
      const Item* item = schedule_.items + schedule_.slots[(last - unit) / heads].first_item;
      return BackwardBlock{item, (last - unit) % heads, item->first_block * kLanes};
    };
    auto work = [&](const Turn& turn, char* memory) {
      Carver carve(memory);
      BackwardScratch<Arithmetic> scratch(p_, wanted_, schedule_.most_keys, schedule_.scratch_rows, carve);
      const BackwardBlock after = turn.next >= 0 ? first_block(turn.next) : BackwardBlock{};
      run_unit(schedule_.slots[(last - turn.unit) / heads], (last - turn.unit) % heads,
               turn.next >= 0 ? &after : nullptr, scratch);
    };
    if (wanted_.query || wanted_.keys || wanted_.prefix)
      for_each_unit<typename Arithmetic::Registers>(parallel, schedule_.num_slots * heads, measure.used(), work);
    if (wanted_.keys) reduce_keys(parallel);
    if (wanted_.prefix) reduce_prefixes(parallel);
  }

 private:
  static constexpr int64_t kFloat = sizeof(float);
  static constexpr int64_t kReducedKeys = 128;  // a unit of the reduction of key gradients

  float* partial_keys(int64_t kv_head) const {
    return reinterpret_cast<float*>(partials_.data()) + kv_head * schedule_.partial_rows * (key_width_ + value_width_);
  }
  float* partial_values(int64_t kv_head) const { return partial_keys(kv_head) + schedule_.partial_rows * key_width_; }
  float* prefix_buffer(int64_t kv_head, int64_t buffer) const {
    return reinterpret_cast<float*>(buffers_.data()) + (kv_head * schedule_.num_buffers + buffer) * prefix_size_;
  }

  void run_unit(const Slot& slot, int64_t kv_head, const BackwardBlock* after, BackwardScratch<Arithmetic>& w) const {
    KeySums sums;
    if (wanted_.prefix && slot.prefix >= 0) {
      sums = {{w.grad_prefix_key, key_width_}, {w.grad_prefix_value, value_width_}};
      if (slot.buffer >= 0) {
        float* buffer = prefix_buffer(kv_head, slot.buffer);
        sums = {{buffer, key_width_}, {buffer + p_.prefix_capacity * key_width_, value_width_}};
      }
    }
    w.prefix_keys.begin(false);
    w.prefix_values.begin(false);
    for (int64_t i = slot.first_item; i < slot.last_item; ++i) {
      const Item* items = schedule_.items;
      const BackwardBlock next{items + i + 1, kv_head, i + 1 < slot.last_item ? items[i + 1].first_block * kLanes : 0};
      run_item(items[i], kv_head, i + 1 < slot.last_item ? &next : after, sums, w);
    }
    fill_rest(sums, p_.prefix_capacity);
    if (sums.key.data != nullptr && slot.buffer < 0)
      write_prefix(slot.prefix, kv_head, 1, sums.key.data, sums.value.data, w.query_room, w.grad_out_room);
  }

  void run_item(const Item& item, int64_t kv_head, const BackwardBlock* after, KeySums& prefix_sums,
                BackwardScratch<Arithmetic>& w) const {
    const Sequence& s = p_.sequences[item.sequence];
    const KeyList& list = lists_[item.sequence];
    const int64_t rows = item.keys.end - item.keys.begin;
    KeySums sums;
    if (wanted_.keys && item.partial >= 0) {
      sums = {{partial_keys(kv_head) + item.partial * key_width_, key_width_},
              {partial_values(kv_head) + item.partial * value_width_, value_width_}};
    } else if (wanted_.keys) {
      sums = {{w.grad_key, key_width_}, {w.grad_value, value_width_}};
      // Without padding, the rows of the sums are rows of the gradient.
      if (list.position == nullptr) {
        const Row place{s.batch, kv_head, s.key_start + item.keys.begin};
        sums = {rows_or_room(p_.grad_key, place, rows, p_.head_dim, key_width_, w.grad_key),
                rows_or_room(p_.grad_value, place, rows, p_.value_dim, value_width_, w.grad_value)};
      }
    }
    w.keys.begin(false);
    w.values.begin(false);
    for (int64_t block = item.first_block; block < item.last_block; ++block) {
      const bool last = block + 1 == item.last_block;
      const BackwardBlock place{&item, kv_head, block * kLanes}, next{&item, kv_head, (block + 1) * kLanes};
      backward_block(p_, wanted_, place, last ? after : &next, list, sums, prefix_sums, w);
    }
    fill_rest(sums, rows);
    if (!wanted_.keys || item.parts > 1) return;
    finish_keys(p_.grad_key, s, list, item, sums.key.data, w.grad_key, kv_head, p_.head_dim, key_width_, w.query_room);
    finish_keys(p_.grad_value, s, list, item, sums.value.data, w.grad_value, kv_head, p_.value_dim, value_width_,
                w.grad_out_room);
  }

  // The whole gradient of the keys (or values) of one item and one head, from sums that are in place or in `room`.
  static void finish_keys(const View& to, const Sequence& s, const KeyList& list, const Item& item, const float* sums,
                          const float* room, int64_t kv_head, int64_t count, int64_t width, float* row) {
    auto write = [&](int64_t first, int64_t last) {
      write_key_gradient(to, s, list, &item, &sums, 1, kv_head, first, last, count, width, row);
    };
    if (sums == room) return write(0, s.key_length);
    write(0, item.keys.begin);
    write(item.keys.end, s.key_length);
  }

  // Zeros in the rows that nothing was written to.
  void fill_rest(const KeySums& sums, int64_t rows) const {
    if (sums.key.data == nullptr) return;
    sums.key.fill_zero(sums.written, rows, key_width_);
    sums.value.fill_zero(sums.written, rows, value_width_);
  }

  void write_prefix(int64_t prefix, int64_t kv_head, int64_t buffers, const float* keys, const float* values,
                    float* key_row, float* value_row) const {
    const int64_t rows = p_.prefix_capacity, place = (prefix * p_.num_kv_heads + kv_head) * rows;
    write_prefix_gradient(p_.grad_prefix_key + place * p_.head_dim, keys, prefix_size_, buffers, rows, p_.head_dim,
                          key_width_, key_row);
    write_prefix_gradient(p_.grad_prefix_value + place * p_.value_dim, values, prefix_size_, buffers, rows,
                          p_.value_dim, value_width_, value_row);
  }

  // Sequences that were cut into parts: stretches of keys in parallel, parts added in order.
  void reduce_keys(const Parallel& parallel) const {
    for (int64_t i = 0; i < schedule_.num_items; i += schedule_.items[i].parts) {
      const Item* items = schedule_.items + i;
      if (items->parts == 1) continue;
      const Sequence& s = p_.sequences[items->sequence];
      const int64_t stretches = ceil_div(s.key_length, kReducedKeys), parts = items->parts;
      auto work = [&](const Turn& turn, char* memory) {
        const int64_t kv_head = turn.unit / stretches, first = turn.unit % stretches * kReducedKeys;
        const int64_t last = min(first + kReducedKeys, s.key_length);
        Carver carve(memory);
        auto* row = carve.take<float>(max(key_width_, value_width_));
        auto* sums = carve.take<const float*>(parts);
        for (int64_t n = 0; n < parts; ++n) sums[n] = partial_keys(kv_head) + items[n].partial * key_width_;
        write_key_gradient(p_.grad_key, s, lists_[items->sequence], items, sums, parts, kv_head, first, last,
                           p_.head_dim, key_width_, row);
        for (int64_t n = 0; n < parts; ++n) sums[n] = partial_values(kv_head) + items[n].partial * value_width_;
        write_key_gradient(p_.grad_value, s, lists_[items->sequence], items, sums, parts, kv_head, first, last,
                           p_.value_dim, value_width_, row);
      };
      Carver measure;
      measure.take<float>(max(key_width_, value_width_));
      measure.take<const float*>(parts);
      for_each_unit(parallel, p_.num_kv_heads * stretches, measure.used(), work);
    }
  }

  // Prefixes with several buffers: added in order. Prefixes that no sequence names: zeros.
  void reduce_prefixes(const Parallel& parallel) const {
    const int64_t heads = p_.num_kv_heads;
    Buffer slots_memory((2 * p_.num_prefixes) * static_cast<int64_t>(sizeof(int64_t)));
    auto* first_buffer = reinterpret_cast<int64_t*>(slots_memory.data());
    int64_t* count = first_buffer + p_.num_prefixes;
    for (int64_t e = 0; e < p_.num_prefixes; ++e) count[e] = 0;
    for (int64_t i = 0; i < schedule_.num_slots; ++i) {
      const Slot& slot = schedule_.slots[i];
      if (slot.prefix < 0) continue;
      if (count[slot.prefix]++ == 0) first_buffer[slot.prefix] = slot.buffer;
    }
    auto work = [&](const Turn& turn, char* memory) {
      const int64_t unit = turn.unit, prefix = unit / heads, kv_head = unit % heads, rows = p_.prefix_capacity;
      if (count[prefix] == 0) {
        fill_zero(p_.grad_prefix_key + unit * rows * p_.head_dim, rows * p_.head_dim);
        fill_zero(p_.grad_prefix_value + unit * rows * p_.value_dim, rows * p_.value_dim);
      } else if (first_buffer[prefix] >= 0) {
        const float* keys = prefix_buffer(kv_head, first_buffer[prefix]);
        auto* row = reinterpret_cast<float*>(memory);
        write_prefix(prefix, kv_head, count[prefix], keys, keys + rows * key_width_, row, row);
      }
    };
    for_each_unit(parallel, p_.num_prefixes * heads, max(key_width_, value_width_) * kFloat, work);
  }

  const AttentionBackward& p_;
  const Wanted wanted_;
  const int64_t key_width_, value_width_, prefix_size_;  // the last in floats, of one head's prefix
  const KeyLists lists_;
  const BackwardSchedule schedule_;
  const Buffer partials_, buffers_;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
