// Soft embedding, whatever the device: what the kernels are given and what they must fill.
#pragma once

#include <cstdint>

#include "types.h"

namespace prefixcore {

struct EmbeddingForward {
  const int64_t* ids = nullptr;  // [count], each in [0, vocabulary + num_virtual)
  int64_t count = 0;
  int64_t vocabulary = 0, num_virtual = 0, hidden = 0;
  ConstView weight;        // [V, E], stride[0] between rows
  ConstView virtual_rows;  // [N, E], in the dtype of weight or float32
  View out;                // [count, E] contiguous, dtype of weight
};

struct EmbeddingBackward {
  const int64_t* ids = nullptr;
  int64_t count = 0;
  int64_t vocabulary = 0, num_virtual = 0, hidden = 0;
  ConstView grad_out;             // [count, E], stride[0] between rows
  float* grad_virtual = nullptr;  // [N, E] contiguous, written whole
};

}  // namespace prefixcore
