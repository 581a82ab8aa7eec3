// Arithmetic in float32, on every machine: an element of a product is one number. arithmetic.h says what each member
// is.
#pragma once

#include "head_keys.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

struct Float32 {
  struct ThreadState {};
  using Element = float;
  using Vector = Vec;
  using Rounded = Vec;
  static constexpr int kPack = 1;
  static constexpr int kDepth = 1;
  static constexpr float kRescaleThreshold = 0.0f;
  static constexpr bool kScalesQuery = true;

  static PREFIXCORE_INLINE Vector broadcast(const Element* x) { return splat(*x); }
  static PREFIXCORE_INLINE Vector load_elements(const Element* from) { return load(from); }
  static PREFIXCORE_INLINE Vec multiply_add(Vec sum, Vector a, Vector b) { return sum + a * b; }

  // A score in units of log 2, from a product that finish_scores left `factor` short of it.
  static PREFIXCORE_INLINE Vec scaled(Vec score, float) { return score; }
  static PREFIXCORE_INLINE Vec exp2(Vec x) { return PREFIXCORE_ISA::exp2(x); }

  template <DType dtype>
  static PREFIXCORE_INLINE void load_row_elements(Element* to, const void* from, int64_t count, int64_t width) {
    load_row<dtype>(to, from, count, width);
  }

  // Keys [first, first + keys), where they lie if possible, else packed into `buffer` [keys x width elements].
  static MatrixView<Element> key_rows(Element* buffer, int64_t width, const HeadKeys& from, int64_t first, int keys) {
    return float_key_rows(buffer, width, from, first, keys);
  }

  // The same memory read the other way.
  static MatrixView<Element> columns(Element*, int64_t, const MatrixView<Element>& rows, int) { return rows; }

  static PREFIXCORE_INLINE Rounded round(const Vec (&x)[kPack]) { return x[0]; }
  static PREFIXCORE_INLINE void store_columns(Element* to, Rounded x) { store(to, x); }
  static PREFIXCORE_INLINE void store_rows(Element* to, int64_t, Rounded x) { store(to, x); }
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
