// Arithmetic in bfloat16 where the CPU multiplies pairs of them (AVX512_BF16): an element of a product is two
// neighbours along k in 32 bits, and one instruction does two multiplications a lane, summing in float32.
//
// Rows of bfloat16 tensors are such elements as they stand. Columns take two matrix rows interleaved; where there is no
// second row its half is zero, so that what lies beyond a tile is never multiplied. The softmax, the maxima and all
// sums stay float32. arithmetic.h says what each member is.
#pragma once

#if defined(__AVX512BF16__)

#include <immintrin.h>

#include "head_keys.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

struct Bfloat16Pair {
  uint16_t first, second;
};

struct Bfloat16Pairs {
  struct ThreadState {};
  using Element = Bfloat16Pair;
  typedef uint32_t Vector __attribute__((vector_size(64)));
  typedef uint16_t Rounded __attribute__((vector_size(64)));  // kLanes numbers of one matrix row, then of the next
  static constexpr int kPack = 2;
  static constexpr int kDepth = 1;
  static constexpr float kRescaleThreshold = 8.0f;  // a floating-point probability of 2^8 is as exact as one of 1
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

  // 2^x to 3e-6, far below the error of rounding to bfloat16, and exactly 0 below 2^-100.
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
    for (; i + kLanes <= count; i += kLanes) store_half(half + 2 * i, load_half<dtype>(from, i));
    if (i < count) {
      alignas(64) char tail[kLanes * 4] = {};
      __builtin_memcpy(tail, static_cast<const char*>(from) + i * size_of(dtype),
                       static_cast<size_t>((count - i) * size_of(dtype)));
      store_half(half + 2 * i, load_half<dtype>(tail, 0));
      i += kLanes;
    }
    for (; i < kPack * width; i += kLanes) store_half(half + 2 * i, VecHalf{});
  }

  // Keys [first, first + keys): in place where elements lie whole and columns() can read whole vectors, else packed
  // into `buffer` [keys x width elements].
  static MatrixView<Element> key_rows(Element* buffer, int64_t width, const HeadKeys& from, int64_t first, int keys) {
    const ConstView& view = *from.view;
    if (view.dtype == DType::bf16 && from.list.position == nullptr && from.dim % kLanes == 0 &&
        view.stride[2] % kPack == 0)  // the offset itself may be odd: elements are read at any address
      return {reinterpret_cast<const Element*>(static_cast<const uint16_t*>(view.data) + from.offset(first)),
              view.stride[2] / kPack};
    pack_keys(buffer, width, from, first, keys);
    return {buffer, width};
  }

  // to[keys x width elements], rounded to nearest even if the tensor is not bfloat16.
  static void pack_keys(Element* to, int64_t width, const HeadKeys& from, int64_t first, int keys) {
    switch (from.view->dtype) {
      case DType::f32: return pack_keys<DType::f32>(to, width, from, first, keys);
      case DType::bf16: return pack_keys<DType::bf16>(to, width, from, first, keys);
      case DType::f16: return pack_keys<DType::f16>(to, width, from, first, keys);
    }
  }

  // buffer[count / 2 rounded up x width]: `width` numbers (a multiple of kLanes) of each two matrix rows, interleaved.
  static MatrixView<Element> columns(Element* buffer, int64_t width, const MatrixView<Element>& rows, int count) {
    for (int i = 0; i < count; i += kPack) {
      const Element *first = rows.data + i * rows.stride, *second = first + rows.stride;
      Element* to = buffer + i / kPack * width;
      const bool alone = i + 1 == count;
      for (int64_t d = 0; d < width; d += kLanes)
        store_columns(to + d,
                      join(load_half<DType::bf16>(first, d), alone ? VecHalf{} : load_half<DType::bf16>(second, d)));
    }
    return {buffer, width};
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
  static void pack_keys(Element* to, int64_t width, const HeadKeys& from, int64_t first, int keys) {
    const char* start = static_cast<const char*>(from.view->data) + from.start_offset() * size_of(dtype);
    const int64_t stride = from.view->stride[2];
    for (int i = 0; i < keys; ++i)
      load_row_elements<dtype>(to + i * width, start + from.list[first + i] * stride * size_of(dtype), from.dim, width);
  }
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA

#endif
