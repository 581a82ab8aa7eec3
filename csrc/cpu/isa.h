// Which instruction set the kernels use. Every table is compiled from the same sources; one is
// chosen when the library is first used.
#pragma once

#include <cstdint>

#include "attention/problem.h"
#include "embedding/embedding.h"

namespace prefixcore::cpu {

struct Kernels {
  const char* isa;  // "baseline", "avx2", "avx512", "avx512_bf16" or "amx"
  AttentionKernels attention;
  EmbeddingKernels embedding;
};

// The best table this machine can run, or the one that PREFIXCORE_ISA names.
// Throws std::runtime_error if that name is unknown, not compiled in or not runnable here.
const Kernels& kernels();

// Names of the tables that were compiled in and that this machine can run, best first;
// returns how many there are and writes at most `capacity` of them.
int32_t runnable_isas(const char** names, int32_t capacity);

// Switches to another table; tests use it. Throws like kernels().
void select_isa(const char* name);

}  // namespace prefixcore::cpu
