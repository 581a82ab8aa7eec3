#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "embedding.h"
#include "launch.h"

namespace prefixcore::cuda {
namespace {

// What runs unless `embedding.cu` is asked for: warps take a row, or a part of one, and end. An H200 has run it.
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kLoads = 4;  // of a lane, under way at a time
constexpr int kSegment = 32 * kLoads;

struct Gather : EmbeddingForward {
  int64_t row_bytes, weight_bytes, virtual_bytes;  // from one row of the output, and of each table, to the next
  int row_warps_log2;                              // this many warps of a block share a row
};

template <class T>
__device__ T* row_of(void* rows, int64_t row, int64_t bytes) {
  return reinterpret_cast<T*>(static_cast<char*>(rows) + row * bytes);
}

template <class T>
__device__ const T* row_of(const void* rows, int64_t row, int64_t bytes) {
  return reinterpret_cast<const T*>(static_cast<const char*>(rows) + row * bytes);
}

// Rows are copied a Pack at a time, whatever they hold. Only virtual rows in float32 for a table that is not are
// converted, to Converted.
template <class Pack, class Converted>
__global__ void __launch_bounds__(kThreads) gather(Gather p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row_warps = 1 << p.row_warps_log2;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * (kWarps / row_warps) + (warp >> p.row_warps_log2);
  if (place >= p.count) return;
  const int part = warp & (row_warps - 1);
  const int64_t id = p.ids[place], packs = p.row_bytes / static_cast<int64_t>(sizeof(Pack));
  Pack* out = row_of<Pack>(p.out.data, place, p.row_bytes);
  const bool known = id >= 0 && id < p.vocabulary + p.num_virtual;

  if constexpr (!std::is_void_v<Converted>) {
    if (known && id >= p.vocabulary) {
      const float* from = row_of<float>(p.virtual_rows.data, id - p.vocabulary, p.virtual_bytes);
#pragma unroll 4
      for (int64_t d = part * 32 + lane; d < p.hidden; d += row_warps * 32)
        reinterpret_cast<Converted*>(out)[d] = Converted(from[d]);
      return;
    }
  }
  const Pack* from = nullptr;
  if (known && id < p.vocabulary) from = row_of<Pack>(p.weight.data, id, p.weight_bytes);
  if (known && id >= p.vocabulary) from = row_of<Pack>(p.virtual_rows.data, id - p.vocabulary, p.virtual_bytes);
#pragma unroll 1
  for (int64_t first = part * kSegment + lane; first < packs; first += row_warps * kSegment) {
    Pack pack[kLoads];
    memset(pack, 0xff, sizeof(pack));  // NaN in every dtype
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (known && first + 32 * i < packs) pack[i] = from[first + 32 * i];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (first + 32 * i < packs) out[first + 32 * i] = pack[i];
  }
}

template <class Pack>
cudaError_t launch_gather(const EmbeddingForward& forward, cudaStream_t stream) {
  Gather p{forward, 0, 0, 0, 0};
  p.row_bytes = p.hidden * size_of(p.out.dtype);
  p.weight_bytes = p.weight.stride[0] * size_of(p.weight.dtype);
  p.virtual_bytes = p.virtual_rows.stride[0] * size_of(p.virtual_rows.dtype);
  const int64_t segments = ceil_div(p.row_bytes / static_cast<int64_t>(sizeof(Pack)), kSegment);
  while (1 << p.row_warps_log2 < kWarps && 1 << p.row_warps_log2 < segments) ++p.row_warps_log2;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.count, kWarps >> p.row_warps_log2)));
  if (p.virtual_rows.dtype == p.weight.dtype) return launch(gather<Pack, void>, p, grid, kThreads, stream);
  if constexpr (sizeof(Pack) != sizeof(float)) {
    if (p.weight.dtype == DType::bf16) return launch(gather<Pack, __nv_bfloat16>, p, grid, kThreads, stream);
    if (p.weight.dtype == DType::f16) return launch(gather<Pack, __half>, p, grid, kThreads, stream);
  }
  return cudaErrorInvalidValue;  // narrow virtual rows for a table in float32: the binding refuses them
}

}  // namespace

cudaError_t embedding_forward_by_rows(const EmbeddingForward& p, cudaStream_t stream) {
  const int64_t size = size_of(p.out.dtype);
  const bool same = p.virtual_rows.dtype == p.weight.dtype;
  uintptr_t addresses = reinterpret_cast<uintptr_t>(p.out.data) | reinterpret_cast<uintptr_t>(p.weight.data);
  int64_t distances = p.hidden | p.weight.stride[0];
  if (same) {
    addresses |= reinterpret_cast<uintptr_t>(p.virtual_rows.data);
    distances |= p.virtual_rows.stride[0];
  }
  if (addresses % 16 == 0 && distances * size % 16 == 0) return launch_gather<uint4>(p, stream);
  return size == 4 ? launch_gather<uint32_t>(p, stream) : launch_gather<uint16_t>(p, stream);
}

}  // namespace prefixcore::cuda
