// Soft embedding on an NVIDIA GPU.
//
// Checking the ids would stall the stream, and a trap would cost the process its GPU: an id out of range reads nothing
// and its row becomes NaN, so that whoever computes with it sees it. The backward passes over such ids.
#pragma once

#include <cuda_runtime.h>

#include "../embedding.h"

namespace prefixcore::cuda {

cudaError_t embedding_forward(const EmbeddingForward&, cudaStream_t);

// The same by blocks that have a few rows each and end; an H200 has run these.
cudaError_t embedding_forward_by_rows(const EmbeddingForward&, cudaStream_t);

// How many numbers of working memory the backward needs.
int64_t embedding_backward_memory(const EmbeddingBackward&);
cudaError_t embedding_backward(const EmbeddingBackward&, int64_t* memory, cudaStream_t);

}  // namespace prefixcore::cuda
