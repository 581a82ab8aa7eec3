// Registers the CUDA kernels of the ops that are defined beside the CPU's.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../embedding_tensors.h"
#include "embedding.h"

// In libtorch_cuda, on which this library must not depend: it also loads where torch has no CUDA. So the symbol is
// weak, for whoever links it in, and otherwise looked up: torch does not load its libraries into the global scope.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace prefixcore::cuda {
namespace {

auto find_current_stream() {
  auto* function = &aoti_torch_get_current_cuda_stream;
  if (function == nullptr)
    if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD))
      function = reinterpret_cast<decltype(function)>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  if (function == nullptr)
    throw std::runtime_error("prefixcore: expected a PyTorch with CUDA, but libtorch_cuda.so is not loaded");
  return function;
}

// Launches on the device of `t` and on its current stream.
template <class Launch>
void on_device_of(const Tensor& t, const Launch& launch) {
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  void* stream = nullptr;
  static const auto current_stream = find_current_stream();
  TORCH_ERROR_CODE_CHECK(current_stream(t.get_device_index(), &stream));
  const cudaError_t error = launch(static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("prefixcore: CUDA error: ") + cudaGetErrorString(error));
}

// The dispatcher calls this kernel where one of the tensors is on a GPU.
void check_device(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  int32_t type, other_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(other.get(), &other_type));
  if (type != other_type || t.get_device_index() != other.get_device_index())
    refuse(name, std::string("the device of ") + other_name, "another one");
}

Tensor soft_embedding(const Tensor& input_ids, const Tensor& table, const Tensor& prompt) {
  check_device(input_ids, "input_ids", table, "weight");
  check_device(prompt, "virtual", table, "weight");
  check_embedding(input_ids, table, prompt);
  const Tensor ids = contiguous_ids(input_ids), weight = rows(table), virtual_rows = rows(prompt);
  Tensor out = empty_embedding(input_ids, weight);
  const EmbeddingForward problem = embedding_problem(ids, weight, virtual_rows, out);
  on_device_of(weight, [&](cudaStream_t stream) { return embedding_forward(problem, stream); });
  return out;
}

Tensor soft_embedding_backward(const Tensor& grad_out, const Tensor& input_ids, int64_t vocabulary,
                               int64_t num_virtual) {
  check_device(input_ids, "input_ids", grad_out, "grad");
  check_embedding_backward(grad_out, input_ids, vocabulary, num_virtual);
  const Tensor ids = contiguous_ids(input_ids), grad = as_contiguous(grad_out);
  Tensor grad_virtual = empty_float(grad, {num_virtual, grad.size(grad.dim() - 1)});
  const EmbeddingBackward problem = embedding_problem(ids, grad, vocabulary, grad_virtual);
  Tensor memory = empty(grad, aoti_torch_dtype_int64(), {embedding_backward_memory(problem)});
  on_device_of(grad, [&](cudaStream_t stream) {
    return embedding_backward(problem, static_cast<int64_t*>(memory.mutable_data_ptr()), stream);
  });
  return grad_virtual;
}

}  // namespace
}  // namespace prefixcore::cuda

STABLE_TORCH_LIBRARY_IMPL(prefixcore, CUDA, m) {
  m.impl("soft_embedding", TORCH_BOX(&prefixcore::cuda::soft_embedding));
  m.impl("soft_embedding_backward", TORCH_BOX(&prefixcore::cuda::soft_embedding_backward));
}
