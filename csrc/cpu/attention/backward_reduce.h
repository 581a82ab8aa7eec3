// The end of the backward pass: float32 sums become gradients in their place and dtype.
#pragma once

#include "backward_block.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// Adds up `count` rows, `stride` apart, in order.
static const float* add_rows(float* to, const float* from, int64_t stride, int64_t count, int64_t width) {
  if (count == 1) return from;
  for (int64_t d = 0; d < width; d += kWidth) {
    Vec total = load(from + d);
    for (int64_t i = 1; i < count; ++i) total += load(from + i * stride + d);
    store(to + d, total);
  }
  return to;
}

// The gradient of the keys (or values) of one sequence and one head, from the sums of its items;
// `sums[i]` has a row of `width` for every slot of items[i].keys. Keys nobody sees get zeros.
static void write_key_gradient(const View& to, const Sequence& s, const KeyList& list, const Item* items,
                               const float* const* sums, int64_t num_items, int64_t kv_head, int64_t first,
                               int64_t last, int64_t count, int64_t width, float* row) {
  char* data = static_cast<char*>(to.data);
  int64_t slot = list.first_from(first);
  for (int64_t position = first; position < last; ++position) {
    const float* total = nullptr;
    if (slot < list.count && list[slot] == position) {
      for (int64_t i = 0; i < num_items; ++i) {
        if (slot < items[i].keys.begin || slot >= items[i].keys.end) continue;
        const float* part = sums[i] + (slot - items[i].keys.begin) * width;
        if (total == nullptr) {
          total = part;
          continue;
        }
        for (int64_t d = 0; d < width; d += kWidth) store(row + d, load(total + d) + load(part + d));
        total = row;
      }
      ++slot;
    }
    if (total == nullptr) {
      fill_zero(row, width);
      total = row;
    }
    const int64_t place = s.batch * to.stride[0] + kv_head * to.stride[1] + (s.key_start + position) * to.stride[2];
    store_row(data + place * size_of(to.dtype), to.dtype, total, count, 1.0f);
  }
}

// Rows [0, rows) of a prefix gradient; `to` is [rows, count] contiguous, `from` holds `buffers`
// arrays `stride` apart with rows of `width`.
static void write_prefix_gradient(float* to, const float* from, int64_t stride, int64_t buffers, int64_t rows,
                                  int64_t count, int64_t width, float* row) {
  for (int64_t i = 0; i < rows; ++i)
    store_row(to + i * count, DType::f32, add_rows(row, from + i * width, stride, buffers, width), count, 1.0f);
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
