// All CPU kernels, compiled once for each instruction set with
//   -DPREFIXCORE_ISA=baseline | avx2 | avx512
// and that set's flags. Everything but the table below has internal linkage or lives in a namespace
// named after the instruction set.
#include "attention_backward_pass.h"
#include "attention_decode.h"
#include "embedding_rows.h"
#include "isa.h"

#define PREFIXCORE_JOIN_(a, b) a##b
#define PREFIXCORE_JOIN(a, b) PREFIXCORE_JOIN_(a, b)
#define PREFIXCORE_TEXT_(a) #a
#define PREFIXCORE_TEXT(a) PREFIXCORE_TEXT_(a)

namespace prefixcore::cpu {
namespace PREFIXCORE_ISA {

static void attention_forward(const AttentionForward& p, const Parallel& parallel) {
  if (DecodePass::fits(p))
    DecodePass(p).run(parallel);
  else
    forward_pass(p, parallel);
}

static void attention_backward(const AttentionBackward& p, const Parallel& parallel) { BackwardPass(p).run(parallel); }

}  // namespace PREFIXCORE_ISA

extern const Kernels PREFIXCORE_JOIN(kernels_, PREFIXCORE_ISA);
const Kernels PREFIXCORE_JOIN(kernels_, PREFIXCORE_ISA) = {
    PREFIXCORE_TEXT(PREFIXCORE_ISA),
    {PREFIXCORE_ISA::attention_forward, PREFIXCORE_ISA::attention_backward},
    {PREFIXCORE_ISA::embedding_forward, PREFIXCORE_ISA::embedding_backward},
};

}  // namespace prefixcore::cpu
