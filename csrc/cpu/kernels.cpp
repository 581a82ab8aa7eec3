// All CPU kernels, compiled once for each instruction set with
//   -DPREFIXCORE_ISA=baseline | avx2 | avx512 | avx512_bf16 | amx
// and that set's flags. Everything but the table below has internal linkage or lives in a namespace
// named after the instruction set.
#include "attention/backward_pass.h"
#include "attention/decode_pass.h"
#include "attention/forward_pass.h"
#include "attention/rounded_prefix.h"
#include "embedding/gather.h"
#include "isa.h"

#define PREFIXCORE_JOIN_(a, b) a##b
#define PREFIXCORE_JOIN(a, b) PREFIXCORE_JOIN_(a, b)
#define PREFIXCORE_TEXT_(a) #a
#define PREFIXCORE_TEXT(a) PREFIXCORE_TEXT_(a)

namespace prefixcore::cpu {
namespace PREFIXCORE_ISA {

// Calls use(problem, arithmetic) with the arithmetic that suits the machine and the tensors best. Problems that
// DecodePass computes forward are float32 backward, too: both must see the same prefix, and only this rounds it.
template <class Problem, class Use>
static void with_arithmetic(const Problem& p, [[maybe_unused]] const Parallel& parallel, Use use) {
#if defined(__AVX512BF16__)
  const bool bf16 = p.query.dtype == DType::bf16 && p.key.dtype == DType::bf16 && p.value.dtype == DType::bf16;
  if (bf16 && !DecodePass::fits(p)) return use(RoundedPrefix(p, parallel).problem(), Bfloat16{});
#endif
  use(p, Float32{});
}

static void run_forward(const AttentionForwardProblem& p, const Parallel& parallel) {
  if (DecodePass::fits(p))
    DecodePass(p).run(parallel);
  else
    with_arithmetic(p, parallel, [&](const AttentionForwardProblem& problem, auto arithmetic) {
      ForwardPass<decltype(arithmetic)>(problem).run(parallel);
    });
}

static void run_backward(const AttentionBackwardProblem& p, const Parallel& parallel) {
  with_arithmetic(p, parallel, [&](const AttentionBackwardProblem& problem, auto arithmetic) {
    BackwardPass<decltype(arithmetic)>(problem).run(parallel);
  });
}

}  // namespace PREFIXCORE_ISA

extern const Kernels PREFIXCORE_JOIN(kernels_, PREFIXCORE_ISA);
const Kernels PREFIXCORE_JOIN(kernels_, PREFIXCORE_ISA) = {
    PREFIXCORE_TEXT(PREFIXCORE_ISA),
    {PREFIXCORE_ISA::run_forward, PREFIXCORE_ISA::run_backward},
    {PREFIXCORE_ISA::gather, PREFIXCORE_ISA::sum_virtual_gradients},
};

}  // namespace prefixcore::cpu
