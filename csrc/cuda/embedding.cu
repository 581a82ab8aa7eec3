#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "embedding.h"
#include "launch.h"

namespace prefixcore::cuda {
namespace {

// What bounds it is memory, as it does a copy. By Little's law some 4.2 TB/s at 800 ns need 25 KiB under way on each of
// an H200's 132 multiprocessors. A lane has kLoads wide loads under way, and those of the next item before it stores
// the last one's: with kBlocks blocks a multiprocessor that is 48 to 96 KiB. The blocks stay: a warp takes one item
// after another, so that no load waits for a block to start; and it reads the ids of 32 items at once, so that one row
// in 32 waits for its id. A row of the table is read once, and the output not at all: loads leave the L1 cache alone,
// and what is stored is the first to leave the L2 cache.
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocks = 3;
constexpr int kLoads = 4;
constexpr int kSegment = 32 * kLoads;  // packs of a row that a warp copies at a time: an item

struct Gather : EmbeddingForward {
  int64_t row_bytes, weight_bytes, virtual_bytes;  // from one row of the output, and of each table, to the next
  int64_t segments, items, warps;                  // of a row; in all; in the grid
};

template <class T>
__device__ T* row_of(void* rows, int64_t row, int64_t bytes) {
  return reinterpret_cast<T*>(static_cast<char*>(rows) + row * bytes);
}

template <class T>
__device__ const T* row_of(const void* rows, int64_t row, int64_t bytes) {
  return reinterpret_cast<const T*>(static_cast<const char*>(rows) + row * bytes);
}

template <class T>
__device__ T load(const T* from) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == sizeof(uint4)) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
  } else {
    return __ldg(from);
  }
#else
  return *from;
#endif
}

template <class T>
__device__ void store(T* to, const T& x) {
#ifdef __CUDA_ARCH__
  __stcs(to, x);
#else
  *to = x;
#endif
}

// As many numbers of a row in float32 as make a Pack of Converted ones.
template <class Pack, class Converted>
__device__ Pack converted(const float* from) {
  constexpr int kNumbers = sizeof(Pack) / sizeof(Converted);
  Converted numbers[kNumbers];
  if constexpr (kNumbers >= 4) {
#pragma unroll
    for (int i = 0; i < kNumbers / 4; ++i) {
      const uint4 four = load(reinterpret_cast<const uint4*>(from) + i);
      float x[4];
      memcpy(x, &four, sizeof(x));
#pragma unroll
      for (int k = 0; k < 4; ++k) numbers[4 * i + k] = Converted(x[k]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) numbers[i] = Converted(from[i]);
  }
  Pack pack;
  memcpy(&pack, numbers, sizeof(pack));
  return pack;
}

// Reads what a lane has of an item: packs first, first + 32 and so on of the row that `id` names.
template <class Pack, class Converted>
__device__ void load_item(const Gather& p, int64_t id, int64_t first, int64_t packs, Pack (&pack)[kLoads]) {
  memset(pack, 0xff, sizeof(pack));  // NaN in every dtype
  if (id < 0 || id >= p.vocabulary + p.num_virtual) return;
  if constexpr (!std::is_void_v<Converted>) {
    if (id >= p.vocabulary) {
      constexpr int kNumbers = sizeof(Pack) / sizeof(Converted);
      const float* from = row_of<float>(p.virtual_rows.data, id - p.vocabulary, p.virtual_bytes);
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (first + 32 * i < packs) pack[i] = converted<Pack, Converted>(from + (first + 32 * i) * kNumbers);
      return;
    }
  }
  const Pack* from = id < p.vocabulary ? row_of<Pack>(p.weight.data, id, p.weight_bytes)
                                       : row_of<Pack>(p.virtual_rows.data, id - p.vocabulary, p.virtual_bytes);
#pragma unroll
  for (int i = 0; i < kLoads; ++i)
    if (first + 32 * i < packs) pack[i] = load(from + first + 32 * i);
}

// Rows are copied a Pack at a time, whatever they hold. Only virtual rows in float32 for a table that is not are
// converted, to Converted.
template <class Pack, class Converted>
__global__ void __launch_bounds__(kThreads, kBlocks) gather(Gather p) {
  const int lane = threadIdx.x % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t packs = p.row_bytes / static_cast<int64_t>(sizeof(Pack));
  for (int64_t begin = warp; begin < p.items; begin += 32 * p.warps) {
    // One item a lane, of the 32 that come next: its place in the output, and the id there.
    const int64_t mine = begin + lane * p.warps, my_place = mine / p.segments;
    const int64_t my_id = mine < p.items ? p.ids[my_place] : -1;
    const int64_t left = (p.items - begin + p.warps - 1) / p.warps, count = left < 32 ? left : 32;

    Pack pack[kLoads], next[kLoads];
    int64_t place = __shfl_sync(0xffffffffu, my_place, 0);
    int64_t first = (begin - place * p.segments) * kSegment + lane;
    load_item<Pack, Converted>(p, __shfl_sync(0xffffffffu, my_id, 0), first, packs, pack);
#pragma unroll 2
    for (int i = 1; i <= count; ++i) {
      const int next_lane = i < count ? i : 0;
      const int64_t next_place = __shfl_sync(0xffffffffu, my_place, next_lane);
      const int64_t next_id = __shfl_sync(0xffffffffu, my_id, next_lane);
      const int64_t next_first = (begin + i * p.warps - next_place * p.segments) * kSegment + lane;
      if (i < count) load_item<Pack, Converted>(p, next_id, next_first, packs, next);
      Pack* out = row_of<Pack>(p.out.data, place, p.row_bytes);
#pragma unroll
      for (int k = 0; k < kLoads; ++k)
        if (first + 32 * k < packs) store(out + first + 32 * k, pack[k]);
#pragma unroll
      for (int k = 0; k < kLoads; ++k) pack[k] = next[k];
      place = next_place;
      first = next_first;
    }
  }
}

template <class Pack>
cudaError_t launch_gather(const EmbeddingForward& forward, cudaStream_t stream) {
  Gather p{forward, 0, 0, 0, 0, 0, 0};
  p.row_bytes = p.hidden * size_of(p.out.dtype);
  p.weight_bytes = p.weight.stride[0] * size_of(p.weight.dtype);
  p.virtual_bytes = p.virtual_rows.stride[0] * size_of(p.virtual_rows.dtype);
  p.segments = ceil_div(p.row_bytes / static_cast<int64_t>(sizeof(Pack)), kSegment);
  p.items = p.count * p.segments;
  int multiprocessors = 0;
  if (const cudaError_t error = count_multiprocessors(&multiprocessors); error != cudaSuccess) return error;
  const int64_t most = static_cast<int64_t>(multiprocessors) * kBlocks, needed = ceil_div(p.items, kWarps);
  const dim3 grid(static_cast<unsigned>(needed < most ? needed : most));
  p.warps = static_cast<int64_t>(grid.x) * kWarps;
  if (p.virtual_rows.dtype == p.weight.dtype) return launch(gather<Pack, void>, p, grid, kThreads, stream);
  if constexpr (sizeof(Pack) != sizeof(float)) {
    if (p.weight.dtype == DType::bf16) return launch(gather<Pack, __nv_bfloat16>, p, grid, kThreads, stream);
    if (p.weight.dtype == DType::f16) return launch(gather<Pack, __half>, p, grid, kThreads, stream);
  }
  return cudaErrorInvalidValue;  // narrow virtual rows for a table in float32: the binding refuses them
}

// Off unless asked for: no GPU has run these kernels yet. `backends/nvidia.py` reads the variable too.
bool streamed() {
  const char* word = std::getenv("PREFIXCORE_STREAMED_EMBEDDING");
  return word != nullptr && std::strcmp(word, "1") == 0;
}

}  // namespace

cudaError_t embedding_forward(const EmbeddingForward& p, cudaStream_t stream) {
  if (p.count == 0 || p.hidden == 0) return cudaSuccess;
  if (!streamed()) return embedding_forward_by_rows(p, stream);
  const int64_t size = size_of(p.out.dtype);
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(p.out.data) | reinterpret_cast<uintptr_t>(p.weight.data) |
                              reinterpret_cast<uintptr_t>(p.virtual_rows.data);
  const int64_t distances =
      (p.hidden | p.weight.stride[0]) * size | p.virtual_rows.stride[0] * size_of(p.virtual_rows.dtype);
  if (addresses % 16 == 0 && distances % 16 == 0) return launch_gather<uint4>(p, stream);
  return size == 4 ? launch_gather<uint32_t>(p, stream) : launch_gather<uint16_t>(p, stream);
}

}  // namespace prefixcore::cuda
