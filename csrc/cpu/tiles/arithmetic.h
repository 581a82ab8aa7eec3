// The arithmetics of this instruction set: Float32 for everything, and Bfloat16 for what is bfloat16 throughout, which
// is Float32 again where the CPU has nothing better.
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
