// Arithmetic in bfloat16 where the CPU multiplies pairs of them (AVX512_BF16): an element of a product is two
// neighbours along k in 32 bits, and one instruction does two multiplications a lane, summing in float32.
//
// Rows of bfloat16 tensors are such elements as they stand. Columns take two rows interleaved; where there is no
// second row its half is zero, so that what lies beyond a tile is never multiplied. The softmax, the maxima and all
// sums stay float32.
#pragma once

#if defined(__AVX512BF16__)

#include <immintrin.h>

#include "../attention/tile_plan.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

struct Bfloat16Pair {
  uint16_t first, second;
};

struct Bfloat16Pairs {
  struct Registers {};
  using Element = Bfloat16Pair;
  typedef uint32_t Vector __attribute__((vector_size(64)));
  typedef uint16_t Rounded __attribute__((vector_size(64)));  // kWidth numbers of one row, then of the next
  static constexpr int kPack = 2;
  static constexpr int kDepth = 1;
  static constexpr float kSlack = 8.0f;  // probabilities up to 2^8 lose nothing in a floating-point format
  static constexpr bool kScalesQuery = false;

  static PREFIXCORE_INLINE Vector broadcast(const Element* x) {
    typedef uint32_t Bits __attribute__((aligned(1), may_alias));
    Vector all = *reinterpret_cast<const Bits*>(x) - Vector{};
#if defined(__clang__)
    asm("" : "+v"(all));  // Clang 16 crashes on a product with a number broadcast from memory
#endif
    return all;
  }
  static PREFIXCORE_INLINE Vector load_elements(const Element* from) {
    return *reinterpret_cast<const VectorAnywhere*>(from);
  }
  // The instruction takes denormals for zero.
  static PREFIXCORE_INLINE Vec multiply_add(Vec sum, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static PREFIXCORE_INLINE Vec scaled(Vec score, float factor) { return score * factor; }

  // 2^x to 3e-6, far below what rounding to bfloat16 takes, and exactly 0 below 2^-100.
  static PREFIXCORE_INLINE Vec exp2(Vec x) {
    const Vec f = above_floor(x);
    Vec p = splat(1.3534167781472206e-2f);
    p = p * f + 5.2011460065841675e-2f;
    p = p * f + 2.414427548646927e-1f;
    p = p * f + 6.930038332939148e-1f;
    p = p * f + 1.0000026226043701f;
    return scale_exp2(p, x);
  }

  template <DType dtype>
  static PREFIXCORE_INLINE void load_row_elements(Element* to, const void* from, int64_t count, int64_t width) {
    auto* half = reinterpret_cast<char*>(to);
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store_half(half + 2 * i, load_half<dtype>(from, i));
    if (i < count) {
      alignas(64) char tail[kWidth * 4] = {};
      __builtin_memcpy(tail, static_cast<const char*>(from) + i * size_of(dtype),
                       static_cast<size_t>((count - i) * size_of(dtype)));
      store_half(half + 2 * i, load_half<dtype>(tail, 0));
      i += kWidth;
    }
    for (; i < kPack * width; i += kWidth) store_half(half + 2 * i, VecHalf{});
  }

  // In place where elements lie whole and columns() can read whole vectors.
  static TileRows<Element> key_rows(Element* room, int64_t width, const ConstView& view, int64_t batch, int64_t head,
                                    int64_t start, const KeyList& list, int64_t slot, int keys, int64_t count) {
    if (view.dtype == DType::bf16 && list.position == nullptr && count % kWidth == 0 && view.stride[2] % kPack == 0) {
      const int64_t offset = row_offset(view.stride, {batch, head, start + slot});  // may be odd
      return {reinterpret_cast<const Element*>(static_cast<const uint16_t*>(view.data) + offset),
              view.stride[2] / kPack};
    }
    pack_rows(room, width, view, batch, head, start, list, slot, keys, count);
    return {room, width};
  }

  // to[keys x width elements], rounded to nearest even if the tensor is not bfloat16.
  static void pack_rows(Element* to, int64_t width, const ConstView& view, int64_t batch, int64_t head, int64_t start,
                        const KeyList& list, int64_t slot, int keys, int64_t count) {
    switch (view.dtype) {
      case DType::f32: return pack<DType::f32>(to, width, view, {batch, head, start}, list, slot, keys, count);
      case DType::bf16: return pack<DType::bf16>(to, width, view, {batch, head, start}, list, slot, keys, count);
      case DType::f16: return pack<DType::f16>(to, width, view, {batch, head, start}, list, slot, keys, count);
    }
  }

  // room[count / 2 rounded up x width]: `width` numbers (a multiple of kWidth) of each two rows interleaved.
  static TileRows<Element> columns(Element* room, int64_t width, const TileRows<Element>& rows, int count) {
    for (int i = 0; i < count; i += kPack) {
      const Element *first = rows.data + i * rows.stride, *second = first + rows.stride;
      Element* to = room + i / kPack * width;
      const bool alone = i + 1 == count;
      for (int64_t d = 0; d < width; d += kWidth)
        store_columns(to + d,
                      join(load_half<DType::bf16>(first, d), alone ? VecHalf{} : load_half<DType::bf16>(second, d)));
    }
    return {room, width};
  }

  static PREFIXCORE_INLINE Rounded round(const Vec (&x)[kPack]) { return (Rounded)_mm512_cvtne2ps_pbh(x[1], x[0]); }
  static PREFIXCORE_INLINE void store_columns(Element* to, Rounded x) {
    typedef uint16_t Index __attribute__((vector_size(64)));
    const Index interleaved{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    store_vector(to, (Vector)_mm512_permutexvar_epi16((__m512i)interleaved, (__m512i)x));
  }
  static PREFIXCORE_INLINE void store_rows(Element* to, int64_t stride, Rounded x) {
    VecHalf half[kPack];
    __builtin_memcpy(half, &x, sizeof(x));
    store_half(to, half[0]);
    store_half(to + stride, half[1]);
  }

 private:
  typedef uint32_t VectorAnywhere __attribute__((vector_size(64), aligned(1), may_alias));

  static PREFIXCORE_INLINE void store_vector(Element* to, Vector x) { *reinterpret_cast<VectorAnywhere*>(to) = x; }
  static PREFIXCORE_INLINE Rounded join(VecHalf first, VecHalf second) {
    return (Rounded)_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512((__m256i)first), (__m256i)second, 1);
  }
  static PREFIXCORE_INLINE void store_half(void* to, VecHalf x) { *static_cast<VecHalfAnywhere*>(to) = x; }

  template <DType dtype>
  static PREFIXCORE_INLINE VecHalf load_half(const void* row, int64_t i) {
    if constexpr (dtype == DType::bf16)
      return *reinterpret_cast<const VecHalfAnywhere*>(static_cast<const char*>(row) + 2 * i);
    else
      return to_bf16(load_as<dtype>(row, i));
  }

  template <DType dtype>
  static void pack(Element* to, int64_t width, const ConstView& view, const Row& first, const KeyList& list,
                   int64_t slot, int keys, int64_t count) {
    const char* from = static_cast<const char*>(view.data) + row_offset(view.stride, first) * size_of(dtype);
    for (int i = 0; i < keys; ++i)
      load_row_elements<dtype>(to + i * width, from + list[slot + i] * view.stride[2] * size_of(dtype), count, width);
  }
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA

#endif
