// The end of the backward pass: float32 sums become gradients in their place and dtype.
#pragma once

#include "backward_schedule.h"
#include "backward_tile.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// Adds up `count` rows, `stride` apart, in order.
static const float* add_rows(float* to, const float* from, int64_t stride, int64_t count, int64_t width) {
  if (count == 1) return from;
  for (int64_t d = 0; d < width; d += kLanes) {
    Vec total = load(from + d);
    for (int64_t i = 1; i < count; ++i) total += load(from + i * stride + d);
    store(to + d, total);
  }
  return to;
}

// The gradient of the keys (or values) at positions [first, last) of one sequence and one head, from the sums of its
// chunks; `sums[i]` has a row of `width` for every key of chunks[i].keys. Keys that nobody sees get zeros. `row` is
// scratch of that width.
static void write_key_gradient(const View& to, const Sequence& s, const KeyList& list, const Chunk* chunks,
                               const float* const* sums, int64_t num_chunks, int64_t kv_head, int64_t first,
                               int64_t last, int64_t dim, int64_t width, float* row) {
  char* data = static_cast<char*>(to.data);
  int64_t key = list.first_from(first);
  for (int64_t position = first; position < last; ++position) {
    const float* total = nullptr;
    if (key < list.count && list[key] == position) {
      for (int64_t i = 0; i < num_chunks; ++i) {
        if (key < chunks[i].keys.begin || key >= chunks[i].keys.end) continue;
        const float* part = sums[i] + (key - chunks[i].keys.begin) * width;
        if (total == nullptr) {
          total = part;
          continue;
        }
        for (int64_t d = 0; d < width; d += kLanes) store(row + d, load(total + d) + load(part + d));
        total = row;
      }
      ++key;
    }
    if (total == nullptr) {
      fill_zero(row, width);
      total = row;
    }
    const int64_t offset = token_offset(to.stride, {s.batch, kv_head, s.key_start + position});
    store_row(data + offset * size_of(to.dtype), to.dtype, total, dim, 1.0f);
  }
}

// `tokens` rows of a prefix gradient; `to` is [tokens, dim] contiguous, `from` holds `buffers` arrays `stride` apart
// with rows of `width`.
static void write_prefix_gradient(float* to, const float* from, int64_t stride, int64_t buffers, int64_t tokens,
                                  int64_t dim, int64_t width, float* row) {
  for (int64_t i = 0; i < tokens; ++i)
    store_row(to + i * dim, DType::f32, add_rows(row, from + i * width, stride, buffers, width), dim, 1.0f);
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
