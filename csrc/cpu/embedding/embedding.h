// Soft embedding on the CPU: one gather from two tables, and the backward into the virtual rows.
#pragma once

#include <vector>

#include "../../embedding.h"
#include "../parallel.h"

namespace prefixcore::cpu {

// Each instruction set compiles one such table from the same source.
struct EmbeddingKernels {
  // Whether every id was in range; if not, the output holds nothing of use.
  bool (*forward)(const EmbeddingForward&, const Parallel&);
  // Virtual row n is named by the ids at places[start[n]] to places[start[n + 1] - 1].
  void (*backward)(const EmbeddingBackward&, const int64_t* start, const int64_t* places, const Parallel&);
};

// The places of each virtual row among the ids, in their order, so that one task can sum one row alone.
struct VirtualPlaces {
  std::vector<int64_t> start, places;  // as EmbeddingKernels::backward wants them

  // Whether every id was in range.
  bool find(const EmbeddingBackward&);
};

// The place of the first id outside [0, limit), or -1.
int64_t first_bad_id(const int64_t* ids, int64_t count, int64_t limit);

}  // namespace prefixcore::cpu
