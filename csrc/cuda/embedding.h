// Soft embedding on an NVIDIA GPU. An id out of range traps, as a device-side assertion does in
// PyTorch's own embedding: asking the host first would stall the stream.
#pragma once

#include <cuda_runtime.h>

#include "../embedding.h"

namespace prefixcore::cuda {

cudaError_t embedding_forward(const EmbeddingForward&, cudaStream_t);
cudaError_t embedding_backward(const EmbeddingBackward&, cudaStream_t);

}  // namespace prefixcore::cuda
