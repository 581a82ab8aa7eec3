// A block of queries, one a column of every tile, and the rows of [B, H, T, D] tensors that belong to them.
//
// The query heads that share one key/value head read the same keys, so they are folded together: query n of a sequence
// and a key/value head is token n / G of head n % G (G query heads a group).
#pragma once

#include "../simd/convert.h"
#include "../simd/transpose.h"
#include "head_keys.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

struct QueryBlock {
  int count = 0;
  int padded = 0;  // count rounded up to a step: the rest is computed on zeros and dropped
  TokenIndex query[kBlockM];

  void add(const TokenIndex& at, int step) {
    query[count++] = at;
    padded = static_cast<int>(round_up(count, step));
  }

  // Whether they are consecutive tokens of one head. Groups of heads are not, nor are decode's blocks, which hold
  // queries of several sequences.
  bool consecutive() const {
    const TokenIndex& first = query[0];
    for (int i = 1; i < count; ++i)
      if (query[i].batch != first.batch || query[i].head != first.head || query[i].token != first.token + i)
        return false;
    return true;
  }
};

template <class Arithmetic, DType dtype, class Element>
static void pack_rows(Element* to, int64_t width, const ConstView& from, const QueryBlock& block, int64_t dim) {
  const char* data = static_cast<const char*>(from.data);
  for (int i = 0; i < block.count; ++i)
    Arithmetic::template load_row_elements<dtype>(
        to + i * width, data + token_offset(from.stride, block.query[i]) * size_of(dtype), dim, width);
  if (block.count < block.padded)
    __builtin_memset(to + block.count * width, 0,
                     static_cast<size_t>((block.padded - block.count) * width) * sizeof(Element));
}

// to[padded x width elements]: the `dim` numbers of each query, zeros after them and in rows without a query.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static void pack_rows(Element* to, int64_t width, const ConstView& from, const QueryBlock& block, int64_t dim) {
  switch (from.dtype) {
    case DType::f32: return pack_rows<Arithmetic, DType::f32>(to, width, from, block, dim);
    case DType::bf16: return pack_rows<Arithmetic, DType::bf16>(to, width, from, block, dim);
    case DType::f16: return pack_rows<Arithmetic, DType::f16>(to, width, from, block, dim);
  }
}

// The same rows to be read only: in place if they are whole float32 vectors of one head and the block is full up to its
// step, else packed into `buffer`.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static MatrixView<Element> load_rows(Element* buffer, int64_t width, const ConstView& from, const QueryBlock& block,
                                     int64_t dim) {
  if constexpr (Arithmetic::kPack == 1)
    if (from.dtype == DType::f32 && dim == width && block.count == block.padded && block.count > 0 &&
        block.consecutive())
      return {static_cast<const float*>(from.data) + token_offset(from.stride, block.query[0]), from.stride[2]};
  pack_rows<Arithmetic>(buffer, width, from, block, dim);
  return {buffer, width};
}

// Writes each query's row, row i multiplied by factor[i] if that is not null.
static void store_rows(const View& to, const QueryBlock& block, const float* from, int64_t width, int64_t dim,
                       const float* factor) {
  char* data = static_cast<char*>(to.data);
  for (int i = 0; i < block.count; ++i)
    store_row(data + token_offset(to.stride, block.query[i]) * size_of(to.dtype), to.dtype, from + i * width, dim,
              factor != nullptr ? factor[i] : 1.0f);
}

// to[i] = sum of a[i][:] * b[i][:] over `width` elements, for `rows` rows, whole vectors of them.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static void row_dots(float* to, const MatrixView<Element>& a, const MatrixView<Element>& b, int64_t width, int rows) {
  for (int i = 0; i < rows; i += kLanes) {
    Vec partial[kLanes];
    for (int k = 0; k < kLanes; ++k) {
      const Element *a_row = a.data + (i + k) * a.stride, *b_row = b.data + (i + k) * b.stride;
      Vec total{};
      for (int64_t d = 0; d < width; d += kLanes)
        total =
            Arithmetic::multiply_add(total, Arithmetic::load_elements(a_row + d), Arithmetic::load_elements(b_row + d));
      partial[k] = total;
    }
    store(to + i, sum_rows(partial));
  }
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
