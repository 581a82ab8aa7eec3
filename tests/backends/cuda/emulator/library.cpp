// The CUDA binding as it is, for tensors on the CPU: compiled with -Dprefixcore=prefixcore_emulated, so that its ops
// stand beside the real ones.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define CUDA CPU  // the dispatch key
#include "cuda/binding.cpp"

// These are defined beside the CPU's kernels, which this library lacks.
STABLE_TORCH_LIBRARY(prefixcore, m) {
  m.def("soft_embedding(Tensor input_ids, Tensor weight, Tensor virtual) -> Tensor");
  m.def("soft_embedding_backward(Tensor grad, Tensor input_ids, int vocabulary, int num_virtual) -> Tensor");
}
