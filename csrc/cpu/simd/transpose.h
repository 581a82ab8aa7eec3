// Transposing float matrices a register-sized square at a time.
#pragma once

#include <utility>

#include "vector.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// Lanes picked from two vectors: lane i is lane index[i] of (a, b) laid end to end.
template <int... index>
PREFIXCORE_INLINE Vec shuffle(Vec a, Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index...);
#else
  return __builtin_shuffle(a, b, VecInt{index...});
#endif
}

// Seen as 2x2 squares of blocks `step` lanes wide, swaps the off-diagonal blocks of rows a and b.
template <int step, int... lane>
PREFIXCORE_INLINE void swap_blocks(Vec& a, Vec& b, std::integer_sequence<int, lane...>) {
  const Vec low = shuffle<((lane & step) ? kLanes + lane - step : lane)...>(a, b);
  const Vec high = shuffle<((lane & step) ? kLanes + lane : lane + step)...>(a, b);
  a = low;
  b = high;
}

template <int step>
PREFIXCORE_INLINE void transpose_square(Vec (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if ((i & step) == 0) swap_blocks<step>(rows[i], rows[i + step], std::make_integer_sequence<int, kLanes>());
  if constexpr (step > 1) transpose_square<step / 2>(rows);
}

// Lane i of the result is the sum of all lanes of rows[i].
template <int step = kLanes / 2>
PREFIXCORE_INLINE Vec sum_rows(Vec (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < step; ++i) {
    swap_blocks<step>(rows[i], rows[i + step], std::make_integer_sequence<int, kLanes>());
    rows[i] += rows[i + step];
  }
  if constexpr (step > 1)
    return sum_rows<step / 2>(rows);
  else
    return rows[0];
}

// to[j][i] = factor * from[i][j]; rows and columns are multiples of kLanes. `factor` may be null: then the
// numbers may be any 32 bits.
static void transpose(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
                      int64_t columns, const Vec* factor) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    for (int64_t i = 0; i < rows; i += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) square[k] = load(from + (i + k) * from_stride + j);
      if (factor != nullptr) {
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) square[k] *= *factor;
      }
      transpose_square<kLanes / 2>(square);
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) store(to + (j + k) * to_stride + i, square[k]);
    }
  }
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
