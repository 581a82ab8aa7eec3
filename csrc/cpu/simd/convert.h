// Rows of float32, bfloat16 or float16 numbers to float32 rows and back, rounding to nearest even.
//
// Bit arithmetic on whole vectors: it needs no F16C and no compiler type for the half formats, and gives the same
// bits on every machine, denormal halves included. AVX-512 has instructions for two of the four conversions: the one
// that reads float16 is exact, the one that rounds to bfloat16 takes denormals for zero, as the products of AVX512_BF16
// do.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../../types.h"
#include "vector.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

PREFIXCORE_INLINE Vec from_bf16(VecHalf x) { return (Vec)(__builtin_convertvector(x, VecBits) << 16); }

PREFIXCORE_INLINE VecHalf to_bf16(Vec x) {
#if defined(__AVX512BF16__)
  return (VecHalf)_mm512_cvtneps_pbh(x);
#else
  const VecBits bits = (VecBits)x;
  const VecBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecBits quiet_nan = (bits >> 16) | 0x40u;
  const VecBits half = (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
  return __builtin_convertvector(half, VecHalf);
#endif
}

PREFIXCORE_INLINE Vec from_f16(VecHalf x) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, (__m256i)x);
#else
  const VecBits half = __builtin_convertvector(x, VecBits);
  const VecBits sign = (half & 0x8000u) << 16;
  const VecBits size = half & 0x7fffu;
  const VecBits normal = (size << 13) + (112u << 23);
  const VecBits infinite = (size << 13) + (224u << 23);
  const VecBits tiny = (VecBits)(__builtin_convertvector((VecInt)size, Vec) * 0x1p-24f);
  VecBits result = size < 0x400u ? tiny : normal;
  result = size >= 0x7c00u ? infinite : result;
  return (Vec)(result | sign);
#endif
}

PREFIXCORE_INLINE VecHalf to_f16(Vec x) {
  const VecBits bits = (VecBits)x;
  const VecBits sign = (bits >> 16) & 0x8000u;
  const VecBits size = bits & 0x7fffffffu;
  const VecBits normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  // Adding 0.5 puts the last bit of a denormal half at the last bit of the float: the addition rounds.
  const VecBits tiny = (VecBits)((Vec)size + 0.5f) - 0x3f000000u;
  VecBits half = size < 0x38800000u ? tiny : normal;  // below 2^-14
  const VecBits infinity = VecBits{} + 0x7c00u, nan = VecBits{} + 0x7e00u;
  half = size >= 0x477ff000u ? infinity : half;  // 65520 and more
  half = size > 0x7f800000u ? nan : half;
  return __builtin_convertvector(half | sign, VecHalf);
}

template <DType dtype>
PREFIXCORE_INLINE Vec load_as(const void* row, int64_t i) {
  if constexpr (dtype == DType::f32) {
    return load(static_cast<const float*>(row) + i);
  } else {
    const VecHalf x = *reinterpret_cast<const VecHalfAnywhere*>(static_cast<const char*>(row) + 2 * i);
    return dtype == DType::bf16 ? from_bf16(x) : from_f16(x);
  }
}

template <DType dtype>
PREFIXCORE_INLINE void store_as(void* row, int64_t i, Vec x) {
  if constexpr (dtype == DType::f32)
    store(static_cast<float*>(row) + i, x);
  else
    *reinterpret_cast<VecHalfAnywhere*>(static_cast<char*>(row) + 2 * i) =
        dtype == DType::bf16 ? to_bf16(x) : to_f16(x);
}

// Reads `count` numbers and writes `width` >= count of them (a multiple of kLanes), zeros after.
template <DType dtype>
PREFIXCORE_INLINE void load_row(float* to, const void* from, int64_t count, int64_t width) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load_as<dtype>(from, i));
  if (i < count) {
    alignas(64) char tail[kLanes * 4] = {};
    __builtin_memcpy(tail, static_cast<const char*>(from) + i * size_of(dtype),
                     static_cast<size_t>((count - i) * size_of(dtype)));
    store(to + i, load_as<dtype>(tail, 0));
    i += kLanes;
  }
  for (; i < width; i += kLanes) store(to + i, Vec{});
}

// Writes `count` numbers, each multiplied by `factor`.
template <DType dtype>
PREFIXCORE_INLINE void store_row(void* to, const float* from, int64_t count, float factor) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_as<dtype>(to, i, load(from + i) * factor);
  if (i < count) {
    alignas(64) char tail[kLanes * 4];
    store_as<dtype>(tail, 0, load(from + i) * factor);
    __builtin_memcpy(static_cast<char*>(to) + i * size_of(dtype), tail,
                     static_cast<size_t>((count - i) * size_of(dtype)));
  }
}

static void store_row(void* to, DType dtype, const float* from, int64_t count, float factor) {
  switch (dtype) {
    case DType::f32: return store_row<DType::f32>(to, from, count, factor);
    case DType::bf16: return store_row<DType::bf16>(to, from, count, factor);
    case DType::f16: return store_row<DType::f16>(to, from, count, factor);
  }
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
