#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "embedding.h"
#include "launch.h"

// A counting sort on the device finds the places of every virtual token, in the order of the ids; then blocks add up
// the rows of their token in that order. No atomics decide an order, so the same bits come out on every run; and only
// the rows that name a virtual token are read.
namespace prefixcore::cuda {
namespace {

constexpr int kWarps = 4;  // one tile of ids each
constexpr int kSortThreads = 32 * kWarps;
constexpr int kScanThreads = 1024;
constexpr int kSumThreads = 128;
constexpr int64_t kMostTiles = 128, kLeastTile = 512;
constexpr int kLoads = 8;  // of a thread, under way at a time: their latencies would otherwise add up

struct Sort : EmbeddingBackward {
  int64_t tile, tiles;
  int64_t* counts;  // [tiles, N]: how often a token stands in a tile; then, how often in the tiles before
  int64_t* starts;  // [N + 1]: where the places of a token begin
  int64_t* places;  // [count]
};

Sort layout(const EmbeddingBackward& p, int64_t* memory) {
  Sort s{p, 0, 0, nullptr, nullptr, nullptr};
  s.tile = ceil_div(ceil_div(p.count, kMostTiles), 32) * 32;
  if (s.tile < kLeastTile) s.tile = kLeastTile;
  s.tiles = ceil_div(p.count, s.tile);
  s.counts = memory;
  s.starts = s.counts + s.tiles * p.num_virtual;
  s.places = s.starts + p.num_virtual + 1;
  return s;
}

// Calls `hit(place, row, peers)` for every id of a tile that names a virtual row; `peers` are the lanes that name the
// same one. A warp at a time, 32 ids at a time, in order; the ids of kLoads such steps are read at once.
template <class Hit>
__device__ void for_each_hit(const Sort& p, int64_t tile, const Hit& hit) {
  const int64_t end = (tile + 1) * p.tile < p.count ? (tile + 1) * p.tile : p.count;
#pragma unroll 1
  for (int64_t first = tile * p.tile + threadIdx.x % 32; first - threadIdx.x % 32 < end; first += 32 * kLoads) {
    int64_t ids[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) ids[i] = first + 32 * i < end ? p.ids[first + 32 * i] : -1;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const bool virtual_row = ids[i] >= p.vocabulary && ids[i] - p.vocabulary < p.num_virtual;
      const unsigned hits = __ballot_sync(0xffffffffu, virtual_row);
      if (hits == 0) continue;
      if (virtual_row) hit(first + 32 * i, ids[i] - p.vocabulary, __match_any_sync(hits, ids[i]));
      __syncwarp();  // what this step has written, the next one reads
    }
  }
}

__global__ void __launch_bounds__(kSortThreads) count_hits(Sort p) {
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (tile >= p.tiles) return;
  int64_t* counts = p.counts + tile * p.num_virtual;
  for (int64_t n = threadIdx.x % 32; n < p.num_virtual; n += 32) counts[n] = 0;
  __syncwarp();
  for_each_hit(p, tile, [&](int64_t, int64_t row, unsigned peers) {
    if (__ffs(peers) - 1 == static_cast<int>(threadIdx.x % 32)) counts[row] += __popc(peers);
  });
}

__global__ void __launch_bounds__(kScanThreads) scan_counts(Sort p) {
  __shared__ int64_t warp_sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t before = 0;  // hits of all rows below `first`
  for (int64_t first = 0; first < p.num_virtual; first += kScanThreads) {
    const int64_t row = first + threadIdx.x;
    int64_t total = 0;
    if (row < p.num_virtual) {
      for (int64_t tile = 0; tile < p.tiles; tile += kLoads) {
        int64_t* counts = p.counts + tile * p.num_virtual + row;
        int64_t found[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) found[i] = tile + i < p.tiles ? counts[i * p.num_virtual] : 0;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          if (tile + i < p.tiles) counts[i * p.num_virtual] = total;
          total += found[i];
        }
      }
    }
    int64_t sum = total;  // of this row and the rows of lower lanes
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    int64_t all = 0;
    for (int w = 0; w < 32; ++w) {
      if (w == warp) sum += all;
      all += warp_sums[w];
    }
    if (row < p.num_virtual) p.starts[row] = before + sum - total;
    before += all;
    __syncthreads();  // before warp_sums is overwritten
  }
  if (threadIdx.x == 0) p.starts[p.num_virtual] = before;
}

__global__ void __launch_bounds__(kSortThreads) place_hits(Sort p) {
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (tile >= p.tiles) return;
  int64_t* counts = p.counts + tile * p.num_virtual;
  for_each_hit(p, tile, [&](int64_t place, int64_t row, unsigned peers) {
    const int lane = static_cast<int>(threadIdx.x % 32), rank = __popc(peers & ((1u << lane) - 1));
    const int64_t before = counts[row];
    p.places[p.starts[row] + before + rank] = place;
    __syncwarp(peers);
    if (rank == 0) counts[row] = before + __popc(peers);
  });
}

template <class Element, int kPack>
struct alignas(kPack * sizeof(Element)) Pack {
  Element x[kPack];
};

template <class Element, int kPack>
__global__ void __launch_bounds__(kSumThreads) sum_rows(Sort p) {
  const int64_t row = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kSumThreads + threadIdx.x) * kPack;
  if (column >= p.hidden) return;
  const Element* grad = static_cast<const Element*>(p.grad_out.data) + column;
  const int64_t end = p.starts[row + 1];
  float sum[kPack] = {};
  const auto add = [&](const Pack<Element, kPack>& pack) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum[i] += float(pack.x[i]);
  };
  const auto at_place = [&](int64_t i) {
    return *reinterpret_cast<const Pack<Element, kPack>*>(grad + p.places[i] * p.grad_out.stride[0]);
  };
  int64_t i = p.starts[row];
  for (; i + kLoads <= end; i += kLoads) {
    Pack<Element, kPack> pack[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) pack[k] = at_place(i + k);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) add(pack[k]);
  }
  for (; i < end; ++i) add(at_place(i));

  constexpr int kStore = kPack < 4 ? 1 : 4;
  auto* to = reinterpret_cast<Pack<float, kStore>*>(p.grad_virtual + row * p.hidden + column);
#pragma unroll
  for (int i = 0; i < kPack / kStore; ++i) {
    Pack<float, kStore> pack;
#pragma unroll
    for (int k = 0; k < kStore; ++k) pack.x[k] = sum[i * kStore + k];
    to[i] = pack;
  }
}

template <class Element>
cudaError_t launch_sum(const Sort& p, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(Element);
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(p.grad_out.data) | reinterpret_cast<uintptr_t>(p.grad_virtual);
  const bool packed = addresses % 16 == 0 && p.grad_out.stride[0] % kPack == 0 && p.hidden % kPack == 0;
  const int64_t columns = kSumThreads * (packed ? kPack : 1);
  const dim3 grid(static_cast<unsigned>(p.num_virtual), static_cast<unsigned>(ceil_div(p.hidden, columns)));
  return launch(packed ? sum_rows<Element, kPack> : sum_rows<Element, 1>, p, grid, kSumThreads, stream);
}

}  // namespace

int64_t embedding_backward_memory(const EmbeddingBackward& p) {
  const Sort s = layout(p, nullptr);
  return s.tiles * p.num_virtual + p.num_virtual + 1 + p.count;
}

cudaError_t embedding_backward(const EmbeddingBackward& problem, int64_t* memory, cudaStream_t stream) {
  if (problem.num_virtual == 0 || problem.hidden == 0) return cudaSuccess;
  const Sort p = layout(problem, memory);
  const dim3 tiles(static_cast<unsigned>(ceil_div(p.tiles, kWarps)));
  cudaError_t error = cudaSuccess;
  if (p.tiles > 0) error = launch(count_hits, p, tiles, kSortThreads, stream);
  if (error == cudaSuccess) error = launch(scan_counts, p, dim3(1), kScanThreads, stream);
  if (error == cudaSuccess && p.tiles > 0) error = launch(place_hits, p, tiles, kSortThreads, stream);
  if (error != cudaSuccess) return error;
  switch (p.grad_out.dtype) {
    case DType::bf16: return launch_sum<__nv_bfloat16>(p, stream);
    case DType::f16: return launch_sum<__half>(p, stream);
    default: return launch_sum<float>(p, stream);
  }
}

}  // namespace prefixcore::cuda
