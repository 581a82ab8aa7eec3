// Arithmetic in float32, on every machine: an element of a product is one number.
//
// An arithmetic is what the attention loops are templates over. It says what one step along k of a product reads
// from A and B (an element: kPack numbers of k), how many of them a product takes at least (kDepth), and how matrices
// get into the two forms that products want: *rows* (elements run along a row) and *columns* (an element holds kPack
// rows at one column).
#pragma once

#include "../attention/tile_plan.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

struct Float32 {
  struct Registers {};  // what a thread holds while it computes
  using Element = float;
  using Vector = Vec;  // kWidth elements
  using Rounded = Vec;
  static constexpr int kPack = 1;
  static constexpr int kDepth = 1;
  // How far (in powers of two) a score may exceed the running maximum before the sums are rescaled.
  static constexpr float kSlack = 0.0f;
  // Whether queries are scaled before the product with the keys, or the product is, after it.
  static constexpr bool kScalesQuery = true;

  static PREFIXCORE_INLINE Vector broadcast(const Element* x) { return splat(*x); }
  static PREFIXCORE_INLINE Vector load_elements(const Element* from) { return load(from); }
  static PREFIXCORE_INLINE Vec multiply_add(Vec sum, Vector a, Vector b) { return sum + a * b; }
  // A score in units of log 2, from a product that finish_scores left `factor` short of it.
  static PREFIXCORE_INLINE Vec scaled(Vec score, float) { return score; }
  static PREFIXCORE_INLINE Vec exp2(Vec x) { return PREFIXCORE_ISA::exp2(x); }

  // One row of a block of queries, `width` elements.
  template <DType dtype>
  static PREFIXCORE_INLINE void load_row_elements(Element* to, const void* from, int64_t count, int64_t width) {
    load_row<dtype>(to, from, count, width);
  }

  // Keys or values as rows: where they lie if possible, else packed into `room` [keys x width elements].
  static TileRows<Element> key_rows(Element* room, int64_t width, const ConstView& view, int64_t batch, int64_t head,
                                    int64_t start, const KeyList& list, int64_t slot, int keys, int64_t count) {
    return tile_rows(room, width, view, batch, head, start, list, slot, keys, count);
  }

  // Rows as columns: the same memory read the other way.
  static TileRows<Element> columns(Element*, int64_t, const TileRows<Element>& rows, int) { return rows; }

  // kPack rows of a tile of scores, a vector of lanes each: rounded, and kept as columns or as rows `stride` apart.
  static PREFIXCORE_INLINE Rounded round(const Vec (&x)[kPack]) { return x[0]; }
  static PREFIXCORE_INLINE void store_columns(Element* to, Rounded x) { store(to, x); }
  static PREFIXCORE_INLINE void store_rows(Element* to, int64_t, Rounded x) { store(to, x); }
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
