// C[M x N] (+)= A[M x K] . B[K x N]: the one matrix product that all of attention is made of.
//
// K counts elements of an arithmetic (arithmetic.h): numbers, or pairs of them that one instruction multiplies. A block
// of C stays in registers while k runs: a few rows (one broadcast element of A each) times a few vectors of columns
// (one load of B each). A is read an element at a time, so it may lie either way: `rows` (k contiguous, as keys times
// transposed queries) or `columns` (i contiguous, which is a transposed product without a transpose). N is a multiple
// of kLanes.
#pragma once

#include "prefetch.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// As much of C as the register file holds beside one vector row of B: of 32 registers, or of 16 on AVX2 and SSE2.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisterRows = 6, kRegisterVectors = 4;
#else
constexpr int kRegisterRows = 6, kRegisterVectors = 2;
#endif

// Steps of k to one prefetch. A block of half the vectors takes half as long for a step: one prefetch a step would then
// be more than the caches can have in flight, and the block's own loads would wait.
constexpr int kSteps = 4 / kRegisterVectors;

// The next row. The empty asm hides where it comes from: the compiler would otherwise compute the address of every
// vector of C before the product and keep them all through it, which costs a tenth of its time.
template <class Number>
PREFIXCORE_INLINE Number* next_row(Number* row, int64_t stride) {
  row += stride;
  asm("" : "+r"(row));
  return row;
}

enum class ALayout { rows, columns };

template <class Arithmetic, ALayout layout, int rows, int vectors>
static void multiply_block(int64_t K, const typename Arithmetic::Element* a, int64_t a_stride,
                           const typename Arithmetic::Element* b, int64_t b_stride, float* c, int64_t c_stride,
                           bool accumulate, PrefetchLines lines) {
  Vec sum[rows][vectors];
  const float* from = c;
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i, from = next_row(from, c_stride))
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) sum[i][j] = accumulate ? load(from + j * kLanes) : Vec{};
  const typename Arithmetic::Element* a_row[rows];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) a_row[i] = a + i * a_stride;
  auto step = [&](int64_t k) __attribute__((always_inline)) {
    typename Arithmetic::Vector b_row[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) b_row[j] = Arithmetic::load_elements(b + k * b_stride + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const auto x = Arithmetic::broadcast(layout == ALayout::rows ? a_row[i] + k : a + k * a_stride + i);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sum[i][j] = Arithmetic::multiply_add(sum[i][j], x, b_row[j]);
    }
  };
  int64_t k = 0;
  for (; k + kSteps <= K; k += kSteps) {
    lines.prefetch();
#pragma GCC unroll 8
    for (int n = 0; n < kSteps; ++n) step(k + n);
  }
  for (; kSteps > 1 && k < K; ++k) step(k);
  float* to = c;
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i, to = next_row(to, c_stride))
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) store(to + j * kLanes, sum[i][j]);
}

template <class Element>
using MultiplyBlock = void (*)(int64_t, const Element*, int64_t, const Element*, int64_t, float*, int64_t, bool,
                               PrefetchLines);

template <class Arithmetic, ALayout layout, int rows, int vectors>
constexpr MultiplyBlock<typename Arithmetic::Element> block_if_it_fits() {
  if constexpr (vectors <= kRegisterVectors)
    return multiply_block<Arithmetic, layout, rows, vectors>;
  else
    return nullptr;
}

// multiply_blocks<Arithmetic, layout>[rows - 1][vectors - 1]
template <class Arithmetic, ALayout layout>
constexpr MultiplyBlock<typename Arithmetic::Element> multiply_blocks[kRegisterRows][4] = {
#define PREFIXCORE_BLOCKS(rows)                                                                      \
  {block_if_it_fits<Arithmetic, layout, rows, 1>(), block_if_it_fits<Arithmetic, layout, rows, 2>(), \
   block_if_it_fits<Arithmetic, layout, rows, 3>(), block_if_it_fits<Arithmetic, layout, rows, 4>()}
    PREFIXCORE_BLOCKS(1), PREFIXCORE_BLOCKS(2), PREFIXCORE_BLOCKS(3),
    PREFIXCORE_BLOCKS(4), PREFIXCORE_BLOCKS(5), PREFIXCORE_BLOCKS(6),
#undef PREFIXCORE_BLOCKS
};

// `total` cut into as few parts of at most `most` as possible, no two of which differ by more than one: 20 rows are 4
// blocks of 5, not 3 of 6 and one of 2, which would multiply less with each load.
struct EvenParts {
  int count, least, longer;  // the first `longer` parts have one more

  EvenParts(int64_t total, int most)
      : count(static_cast<int>(ceil_div(total, most))),
        least(count > 0 ? static_cast<int>(total) / count : 0),
        longer(static_cast<int>(total) - count * least) {}
  int operator[](int part) const { return least + (part < longer); }
};

template <class Arithmetic, ALayout layout>
static void multiply(int64_t M, int64_t N, int64_t K, const typename Arithmetic::Element* a, int64_t a_stride,
                     const typename Arithmetic::Element* b, int64_t b_stride, float* c, int64_t c_stride,
                     bool accumulate, Prefetcher& prefetcher) {
  const EvenParts strips(N / kLanes, kRegisterVectors), blocks(M, kRegisterRows);
  int64_t j = 0;
  for (int s = 0; s < strips.count; ++s) {
    int64_t i = 0;
    for (int r = 0; r < blocks.count; ++r) {
      multiply_blocks<Arithmetic, layout>[blocks[r] - 1][strips[s] - 1](
          K, a + (layout == ALayout::rows ? i* a_stride : i), a_stride, b + j, b_stride, c + i* c_stride + j, c_stride,
          accumulate, prefetcher.next_lines(K / kSteps));
      i += blocks[r];
    }
    j += strips[s] * kLanes;
  }
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
