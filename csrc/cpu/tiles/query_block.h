// A block of query rows: what fills the lanes of every tile.
//
// The query heads that share one key/value head read the same keys, so they are folded together:
// row r of a sequence is token r / G of head r % G (G heads a group). A block holds up to kLanes
// rows; scores and probabilities are kept transposed, one row a lane, so that a maximum or a sum over
// keys is a plain vector operation.
#pragma once

#include "../attention/problem.h"
#include "../simd/convert.h"
#include "../simd/transpose.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

constexpr int kLanes = 64;
// Distance between rows of a transposed tile. Where tiles are worked on in strips narrower than a
// row, a power of two would map the whole strip to a few cache sets.
constexpr int kLaneStride = kWidth == 16 ? kLanes : kLanes + 16;
// Lanes come and go in steps of at least this many: what one pass of the microkernel covers, 16 at most.
constexpr int kLaneStep = kWidth == 16 ? 16 : 2 * kWidth;

// Products take whole steps of kDepth elements along k: so many keys, and so many lanes.
template <class Arithmetic>
constexpr int key_step = Arithmetic::kPack * Arithmetic::kDepth;
template <class Arithmetic>
constexpr int lane_step = max(kLaneStep, key_step<Arithmetic>);

// The elements along k of a product over `count` numbers.
template <class Arithmetic>
constexpr int64_t depth(int64_t count) {
  return round_up(ceil_div(count, Arithmetic::kPack), Arithmetic::kDepth);
}

// Rows of elements, `stride` apart.
template <class Element>
struct TileRows {
  const Element* data;
  int64_t stride;
};

struct Row {
  int64_t batch, head, token;  // indices into the query tensor
};

struct QueryBlock {
  int rows = 0;   // of them are real
  int lanes = 0;  // rows rounded up to the arithmetic's step: the rest computes on zeros and is dropped
  Row row[kLanes];

  void add(Row r, int step) {
    row[rows++] = r;
    lanes = static_cast<int>(round_up(rows, step));
  }

  // Whether its rows are consecutive tokens of one head (decode puts rows of several sequences into one block).
  bool consecutive() const {
    for (int i = 1; i < rows; ++i)
      if (row[i].batch != row[0].batch || row[i].head != row[0].head || row[i].token != row[0].token + i) return false;
    return true;
  }
};

// Rows [first, first + kLanes) of one sequence and one key/value head, as many as there are.
template <class Arithmetic>
static void fill_block(QueryBlock& block, const AttentionProblem& p, const Sequence& s, int64_t kv_head,
                       int64_t first) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t last = min(first + kLanes, s.query_length * group);
  block.rows = block.lanes = 0;
  int64_t token = first / group, head = first % group;
  for (int64_t r = first; r < last; ++r) {
    block.add({s.batch, kv_head * group + head, s.query_start + token}, lane_step<Arithmetic>);
    if (++head == group) {
      head = 0;
      ++token;
    }
  }
}

// `count` numbers in whole vectors of elements.
template <class Arithmetic>
constexpr int64_t steps(int64_t count) {
  return round_up(ceil_div(count, Arithmetic::kPack), kWidth);
}

PREFIXCORE_INLINE int64_t row_offset(const int64_t (&stride)[3], const Row& r) {
  return r.batch * stride[0] + r.head * stride[1] + r.token * stride[2];
}

template <class Arithmetic, DType dtype, class Element>
static void pack_rows(Element* to, int64_t width, const ConstView& from, const QueryBlock& block, int64_t count) {
  const char* data = static_cast<const char*>(from.data);
  for (int i = 0; i < block.rows; ++i)
    Arithmetic::template load_row_elements<dtype>(
        to + i * width, data + row_offset(from.stride, block.row[i]) * size_of(dtype), count, width);
  if (block.rows < block.lanes)
    __builtin_memset(to + block.rows * width, 0,
                     static_cast<size_t>((block.lanes - block.rows) * width) * sizeof(Element));
}

// to[lanes x width elements]: each row's `count` numbers, zeros up to `width` and in lanes without a row.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static void pack_rows(Element* to, int64_t width, const ConstView& from, const QueryBlock& block, int64_t count) {
  switch (from.dtype) {
    case DType::f32: return pack_rows<Arithmetic, DType::f32>(to, width, from, block, count);
    case DType::bf16: return pack_rows<Arithmetic, DType::bf16>(to, width, from, block, count);
    case DType::f16: return pack_rows<Arithmetic, DType::f16>(to, width, from, block, count);
  }
}

// The same rows to be read only: where they lie if they are float32 rows of one head and there is one for every lane,
// else packed into `room`.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static TileRows<Element> load_rows(Element* room, int64_t width, const ConstView& from, const QueryBlock& block,
                                   int64_t count) {
  if constexpr (Arithmetic::kPack == 1)
    if (from.dtype == DType::f32 && count == width && block.rows == block.lanes && block.rows > 0 &&
        block.consecutive())
      return {static_cast<const float*>(from.data) + row_offset(from.stride, block.row[0]), from.stride[2]};
  pack_rows<Arithmetic>(room, width, from, block, count);
  return {room, width};
}

// Row i multiplied by factor[i], if that is not null.
static void store_rows(const View& to, const QueryBlock& block, const float* from, int64_t width, int64_t count,
                       const float* factor) {
  char* data = static_cast<char*>(to.data);
  for (int i = 0; i < block.rows; ++i)
    store_row(data + row_offset(to.stride, block.row[i]) * size_of(to.dtype), to.dtype, from + i * width, count,
              factor != nullptr ? factor[i] : 1.0f);
}

// to[lane] = sum of a[lane][:] * b[lane][:] over `width` elements.
template <class Arithmetic, class Element = typename Arithmetic::Element>
static void row_dots(float* to, const TileRows<Element>& a, const TileRows<Element>& b, int64_t width, int lanes) {
  for (int i = 0; i < lanes; i += kWidth) {
    Vec partial[kWidth];
    for (int k = 0; k < kWidth; ++k) {
      const Element *a_row = a.data + (i + k) * a.stride, *b_row = b.data + (i + k) * b.stride;
      Vec total{};
      for (int64_t d = 0; d < width; d += kWidth)
        total =
            Arithmetic::multiply_add(total, Arithmetic::load_elements(a_row + d), Arithmetic::load_elements(b_row + d));
      partial[k] = total;
    }
    store(to + i, sum_rows(partial));
  }
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
