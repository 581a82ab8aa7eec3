// Soft embedding on the CPU: one gather from two tables, and the backward into the virtual rows.
//
// Both are bound by memory bandwidth and copy with memcpy, which picks its instruction set itself: unlike
// attention they are compiled once.
#pragma once

#include "../embedding.h"
#include "parallel.h"

namespace prefixcore::cpu {

void embedding_forward(const EmbeddingForward&, const Parallel&);
void embedding_backward(const EmbeddingBackward&, const Parallel&);

// The place of the first id outside [0, limit), or -1.
int64_t first_bad_id(const int64_t* ids, int64_t count, int64_t limit);

}  // namespace prefixcore::cpu
