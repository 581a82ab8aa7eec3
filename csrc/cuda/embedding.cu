#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "embedding.h"

namespace prefixcore::cuda {
namespace {

constexpr int kThreads = 256;

// --- forward: one block copies one row --------------------------------------------------------------

template <class Element>
__device__ const Element* row_of(const ConstView& table, int64_t row) {
  return static_cast<const Element*>(table.data) + row * table.stride[0];
}

template <class To, class From>
__device__ void copy_row(To* to, const From* from, int64_t count) {
  if constexpr (sizeof(To) == sizeof(From)) {  // the same dtype: sixteen bytes at a time where they are aligned
    constexpr int64_t kPack = 16 / sizeof(To);
    const bool aligned = (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 == 0;
    const int64_t packs = aligned ? count / kPack : 0;
#pragma unroll 1  // a row is short: unrolling only spills
    for (int64_t i = threadIdx.x; i < packs; i += kThreads)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    for (int64_t i = packs * kPack + threadIdx.x; i < count; i += kThreads) to[i] = from[i];
  } else {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = To(from[i]);
  }
}

template <class Weight, class Virtual>
__global__ void __launch_bounds__(kThreads) gather(EmbeddingForward p) {
  const int64_t place = blockIdx.x;
  const int64_t id = p.ids[place];
  if (id < 0 || id >= p.vocabulary + p.num_virtual) __trap();  // an assertion would spill registers
  Weight* out = static_cast<Weight*>(p.out.data) + place * p.hidden;
  if (id < p.vocabulary)
    copy_row(out, row_of<Weight>(p.weight, id), p.hidden);
  else
    copy_row(out, row_of<Virtual>(p.virtual_rows, id - p.vocabulary), p.hidden);
}

template <class Weight>
void launch_gather(const EmbeddingForward& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.count));
  if (p.virtual_rows.dtype == p.weight.dtype)
    gather<Weight, Weight><<<grid, kThreads, 0, stream>>>(p);
  else
    gather<Weight, float><<<grid, kThreads, 0, stream>>>(p);
}

// --- backward: one block sums kThreads columns of one virtual row -----------------------------------

// Every block reads all ids, a tile at a time, and adds the rows that name its virtual token in the order of the
// ids: no atomics, so the same bits on every run.
template <class Element>
__global__ void __launch_bounds__(kThreads) reduce(EmbeddingBackward p) {
  __shared__ unsigned hits[kThreads / 32];
  const int64_t row = blockIdx.x;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  const bool inside = column < p.hidden;
  float sum = 0.0f;
  for (int64_t tile = 0; tile < p.count; tile += kThreads) {
    const int64_t place = tile + threadIdx.x;
    const bool hit = place < p.count && p.ids[place] == p.vocabulary + row;
    const unsigned warp_hits = __ballot_sync(0xffffffffu, hit);
    if (threadIdx.x % 32 == 0) hits[threadIdx.x / 32] = warp_hits;
    __syncthreads();
    for (int warp = 0; warp < kThreads / 32; ++warp)
      for (unsigned left = hits[warp]; left != 0; left &= left - 1) {
        const int64_t from = tile + warp * 32 + __ffs(left) - 1;
        if (inside) sum += float(row_of<Element>(p.grad_out, from)[column]);
      }
    __syncthreads();
  }
  if (inside) p.grad_virtual[row * p.hidden + column] = sum;
}

template <class Element>
void launch_reduce(const EmbeddingBackward& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.num_virtual), static_cast<unsigned>((p.hidden + kThreads - 1) / kThreads));
  reduce<Element><<<grid, kThreads, 0, stream>>>(p);
}

}  // namespace

cudaError_t embedding_forward(const EmbeddingForward& p, cudaStream_t stream) {
  if (p.count == 0 || p.hidden == 0) return cudaSuccess;
  switch (p.weight.dtype) {
    case DType::f32: launch_gather<float>(p, stream); break;
    case DType::bf16: launch_gather<__nv_bfloat16>(p, stream); break;
    case DType::f16: launch_gather<__half>(p, stream); break;
  }
  return cudaGetLastError();
}

cudaError_t embedding_backward(const EmbeddingBackward& p, cudaStream_t stream) {
  if (p.num_virtual == 0 || p.hidden == 0) return cudaSuccess;
  switch (p.grad_out.dtype) {
    case DType::f32: launch_reduce<float>(p, stream); break;
    case DType::bf16: launch_reduce<__nv_bfloat16>(p, stream); break;
    case DType::f16: launch_reduce<__half>(p, stream); break;
  }
  return cudaGetLastError();
}

}  // namespace prefixcore::cuda
