// The arithmetics of this instruction set: Float32 for everything, and Bfloat16 for problems that are bfloat16
// throughout, which is Float32 again where the CPU has nothing better.
//
// An arithmetic is what the attention loops are templates over. It says what one step along k of a product reads from
// its two factors: an *element*, kPack neighbours along k. It brings matrices into the two forms that products want,
// *rows* (elements run along a matrix row) and *columns* (an element holds kPack matrix rows at one column), and has
// these members, of which float32.h is the simplest example:
//
//   Element, Vector          an element, and kLanes of them
//   Rounded                  kPack rows of a vector of float32 each, rounded to elements
//   ThreadState              what a thread holds while it computes
//   kPack, kDepth            numbers in an element; elements that products take at a time
//   kRescaleThreshold        how far, in powers of two, a score may exceed the running maximum m before the accumulator
//                            is rescaled
//   kScalesQuery             whether queries are scaled before their product with the keys, or the product is after it
//   broadcast, load_elements, multiply_add     what the microkernel is made of
//   scaled, exp2             from products to exponents of 2, and to probabilities
//   load_row_elements        one row of a tensor as elements
//   key_rows                 keys or values as rows, in place if possible
//   columns                  rows as columns
//   round, store_rows, store_columns           kPack rows of a tile of scores as elements
#pragma once

#include "bfloat16_pairs.h"
#include "bfloat16_tiles.h"
#include "float32.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

#if defined(__AMX_BF16__)
using Bfloat16 = Bfloat16Tiles;
#elif defined(__AVX512BF16__)
using Bfloat16 = Bfloat16Pairs;
#else
using Bfloat16 = Float32;
#endif

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
