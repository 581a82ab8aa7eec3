// The tile that attention is computed in: up to kBlockN keys against a block of up to kBlockM queries.
//
//                  queries, one a SIMD lane ->
//              +------------------------------------+
//     keys     |  score of key n and query m at     |   float, [kBlockN][kTileStride]
//      |       |  scores[n * kTileStride + m]       |
//      v       +------------------------------------+
//
// Scores are kept transposed like this so that the maximum and the sum over keys are vertical vector operations, and
// so that any number of keys makes a tile: a prefix of 20 virtual tokens needs no padding.
#pragma once

#include "../simd/vector.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

constexpr int kBlockM = 64, kBlockN = 96;

// Distance between the rows of a tile. A vector of AVX2 or SSE2 covers a part of a row, so tiles are worked on in
// strips of columns there, and with a power of two as stride a whole strip would map to a few cache sets.
constexpr int kTileStride = kLanes == 16 ? kBlockM : kBlockM + 16;

// Queries of a block are computed in steps of at least this many: what one pass of the microkernel covers, 16 at most.
constexpr int kQueryStep = kLanes == 16 ? 16 : 2 * kLanes;

// Products take whole steps of kDepth elements along k (arithmetic.h): so many keys, and so many queries.
template <class Arithmetic>
constexpr int key_step = Arithmetic::kPack * Arithmetic::kDepth;
template <class Arithmetic>
constexpr int query_step = max(kQueryStep, key_step<Arithmetic>);

// The elements along k of a product over `count` numbers.
template <class Arithmetic>
constexpr int64_t product_depth(int64_t count) {
  return round_up(ceil_div(count, Arithmetic::kPack), Arithmetic::kDepth);
}

// The elements that `count` numbers take, in whole vectors.
template <class Arithmetic>
constexpr int64_t padded_elements(int64_t count) {
  return round_up(ceil_div(count, Arithmetic::kPack), kLanes);
}

// Rows of elements to be read, `stride` elements apart.
template <class Element>
struct MatrixView {
  const Element* data;
  int64_t stride;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
