// One register's worth of floats, and the handful of functions the kernels need on it.
//
// GCC's and Clang's vector extensions make the same source SSE2, AVX2, AVX-512 or NEON: the width
// follows from the flags of the translation unit. Everything lives in a namespace named after the
// instruction set, so that the linker can never replace one set's function by another's.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if !defined(PREFIXCORE_ISA)
#error "compile with -DPREFIXCORE_ISA=baseline, avx2, avx512, avx512_bf16 or amx"
#endif

#define PREFIXCORE_INLINE inline __attribute__((always_inline))

namespace prefixcore::cpu::PREFIXCORE_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2)));

// The same at any address, aliasing anything.
typedef float VecAnywhere __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));
typedef uint16_t VecHalfAnywhere __attribute__((vector_size(kLanes * 2), aligned(1), may_alias));

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = __builtin_inff();

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

PREFIXCORE_INLINE Vec load(const float* from) { return *reinterpret_cast<const VecAnywhere*>(from); }
PREFIXCORE_INLINE void store(float* to, Vec x) { *reinterpret_cast<VecAnywhere*>(to) = x; }
PREFIXCORE_INLINE Vec splat(float x) { return x - Vec{}; }
PREFIXCORE_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
PREFIXCORE_INLINE Vec select(VecInt condition, Vec yes, Vec no) { return condition ? yes : no; }

// 0, 1, 2, ... kLanes - 1
PREFIXCORE_INLINE VecInt lane_index() {
  VecInt index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

PREFIXCORE_INLINE bool any(VecInt condition) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= condition[i];
  return found != 0;
}

PREFIXCORE_INLINE float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

#if defined(__AVX512DQ__)
// fraction 2^floor(x), or 0 where x < -100: `fraction` is 2^(x - floor(x)).
PREFIXCORE_INLINE Vec scale_exp2(Vec fraction, Vec x) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(-100.0f), _CMP_NLT_UQ), fraction, x);
}
// x - floor(x)
PREFIXCORE_INLINE Vec above_floor(Vec x) { return _mm512_reduce_ps(x, 9); }
#endif

// 2^x to 2e-7, and exactly 0 below 2^-100: denormal numbers would cost hundreds of cycles each.
// Meant for x <= 0 or so; from 128 on the result is meaningless.
PREFIXCORE_INLINE Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
  const Vec f = above_floor(x);
  Vec p = splat(1.8775765784084797e-3f);
  p = p * f + 8.9893406257033348e-3f;
  p = p * f + 5.5826317518949509e-2f;
  p = p * f + 2.4015361070632935e-1f;
  p = p * f + 6.9315308332443237e-1f;
  p = p * f + 9.9999994039535522e-1f;
  return scale_exp2(p, x);
#else
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec shifted = x + to_integer;
  const Vec f = x - (shifted - to_integer);  // in [-0.5, 0.5]
  Vec p = splat(1.3276472028094803e-3f);
  p = p * f + 9.675541479829453e-3f;
  p = p * f + 5.5507132746514566e-2f;
  p = p * f + 2.4022119721166912e-1f;
  p = p * f + 6.931469670632658e-1f;
  p = p * f + 1.0000000716552193f;
  const Vec scaled = (Vec)((VecBits)p + ((VecBits)shifted << 23));
  return select(x < -100.0f, Vec{}, scaled);
#endif
}

// log2 of a positive normal number.
PREFIXCORE_INLINE Vec log2(Vec x) {
  const VecBits bits = (VecBits)x;
  const VecInt exponent = (VecInt)(bits - 0x3f3504f3u) >> 23;  // leaves a mantissa in [sqrt(1/2), sqrt(2))
  const Vec m = (Vec)(bits - ((VecBits)exponent << 23));
  const Vec s = (m - 1.0f) / (m + 1.0f);
  const Vec s2 = s * s;
  Vec p = splat(2.0f / 9.0f);
  p = p * s2 + 2.0f / 7.0f;
  p = p * s2 + 2.0f / 5.0f;
  p = p * s2 + 2.0f / 3.0f;
  p = p * s2 + 2.0f;
  return __builtin_convertvector(exponent, Vec) + p * s * kLog2e;
}

// The same, and NaN of NaN.
PREFIXCORE_INLINE Vec log2_or_nan(Vec x) { return select(x == x, log2(x), x); }

PREFIXCORE_INLINE Vec tanh(Vec x) {
  const Vec size = select(x < 0.0f, -x, x);
  // Small: the odd series, so that small scores keep all their digits.
  const Vec u = size * size;
  Vec p = splat(-5.717043592871806e-3f);
  p = p * u + 2.0650586075919356e-2f;
  p = p * u + -5.374349774023053e-2f;
  p = p * u + 1.3331491283436908e-1f;
  p = p * u + -3.3333283925183216e-1f;
  const Vec small = size + size * u * p;
  // Large: 1 - 2 / (e^2x + 1), by e^-2x so that nothing overflows.
  const Vec e = exp2(size * (-2.0f * kLog2e));
  const Vec large = (1.0f - e) / (1.0f + e);
  const Vec t = select(size < 0.625f, small, large);
  return select(x < 0.0f, -t, t);
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
