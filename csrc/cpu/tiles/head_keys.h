// The keys, or the values, of one head, wherever they lie: of a prefix, of a batch row, of a packed sequence, with or
// without padding.
//
// float32 rows without padding are read in place; everything else is packed into float32 rows first, so that every
// dtype, stride and padding shares one microkernel.
#pragma once

#include "../simd/convert.h"
#include "prefetch.h"
#include "tile.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// One token of one head: indices into the first three dimensions of [B, H, T, D], or of a prefix bank [N, H, P, D].
struct TokenIndex {
  int64_t batch, head, token;
};

PREFIXCORE_INLINE int64_t token_offset(const int64_t (&stride)[3], const TokenIndex& at) {
  return at.batch * stride[0] + at.head * stride[1] + at.token * stride[2];
}

// The visible keys of a sequence by number. Padded keys are left out of the numbering, so that padding, wherever it
// stands, costs nothing afterwards and what lies there is never read.
struct KeyList {
  const int32_t* position;  // of key i, counted from the sequence's first token; null: i itself
  int64_t count;

  int64_t operator[](int64_t key) const { return position != nullptr ? position[key] : key; }

  // The first key whose position is >= `wanted`.
  int64_t first_from(int64_t wanted) const {
    if (position == nullptr) return min(max<int64_t>(wanted, 0), count);
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (position[middle] < wanted)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

struct HeadKeys {
  const ConstView* view;
  int64_t batch, head;
  int64_t start;  // the sequence's first token
  KeyList list;
  int64_t dim;  // numbers of a key: D, or Dv

  // Where the sequence's first token lies, and key `key`.
  int64_t start_offset() const { return token_offset(view->stride, {batch, head, start}); }
  int64_t offset(int64_t key) const { return start_offset() + list[key] * view->stride[2]; }
};

// to[keys x width] float32, from key `first` on, zeros after each key's numbers.
template <DType dtype>
static void pack_keys(float* to, int64_t width, const HeadKeys& from, int64_t first, int keys) {
  const char* start = static_cast<const char*>(from.view->data) + from.start_offset() * size_of(dtype);
  const int64_t stride = from.view->stride[2];
  for (int i = 0; i < keys; ++i)
    load_row<dtype>(to + i * width, start + from.list[first + i] * stride * size_of(dtype), from.dim, width);
}

// Keys [first, first + keys) as float32 rows of whole vectors: in place if they lie like that, else packed into
// `buffer` [keys x width].
static MatrixView<float> float_key_rows(float* buffer, int64_t width, const HeadKeys& from, int64_t first, int keys) {
  const DType dtype = from.view->dtype;
  if (from.dim == width && dtype == DType::f32 && from.list.position == nullptr)
    return {static_cast<const float*>(from.view->data) + from.offset(first), from.view->stride[2]};
  switch (dtype) {
    case DType::f32: pack_keys<DType::f32>(buffer, width, from, first, keys); break;
    case DType::bf16: pack_keys<DType::bf16>(buffer, width, from, first, keys); break;
    case DType::f16: pack_keys<DType::f16>(buffer, width, from, first, keys); break;
  }
  return {buffer, width};
}

// The tile that starts at key `first`, of keys that end before `end`: everything from its first to its last token.
static void prefetch_keys(Prefetcher& prefetcher, const HeadKeys& from, int64_t first, int64_t end) {
  if (first >= end) return;
  const int64_t size = size_of(from.view->dtype);
  const int64_t tokens = from.list[min(first + kBlockN, end) - 1] + 1 - from.list[first];
  prefetcher.add(static_cast<const char*>(from.view->data) + from.offset(first) * size, from.view->stride[2] * size,
                 tokens, from.dim * size);
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
