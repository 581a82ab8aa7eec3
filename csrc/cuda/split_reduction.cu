#include "launch.h"
#include "split_reduction.h"

namespace prefixcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 8;  // splits whose loads are under way at a time; the sums keep their order

__device__ float add(float a, float b) { return a + b; }
__device__ float4 add(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
__device__ float times(float a, float s) { return a * s; }
__device__ float4 times(float4 a, float s) { return make_float4(a.x * s, a.y * s, a.z * s, a.w * s); }

template <class Pack>  // float, or float4 where everything is aligned
__global__ void __launch_bounds__(kThreads) reduce_splits(SplitReduction p) {
  constexpr int64_t kPack = sizeof(Pack) / sizeof(float);
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place * kPack >= p.count) return;
  const Pack* from = reinterpret_cast<const Pack*>(p.partials) + place;
  Pack sum{};
  const int64_t stride = p.stride / kPack;
  int64_t split = 0;
  for (; split + kAhead <= p.splits; split += kAhead) {
    Pack part[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) part[i] = from[(split + i) * stride];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) sum = add(sum, part[i]);
  }
  for (; split < p.splits; ++split) sum = add(sum, from[split * stride]);
  reinterpret_cast<Pack*>(p.out)[place] = times(sum, p.scale);
}

}  // namespace

cudaError_t split_reduction(const SplitReduction& p, cudaStream_t stream) {
  if (p.count == 0) return cudaSuccess;
  const bool aligned = p.count % 4 == 0 && p.stride % 4 == 0 &&
                       (reinterpret_cast<uintptr_t>(p.partials) | reinterpret_cast<uintptr_t>(p.out)) % 16 == 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(aligned ? p.count / 4 : p.count, kThreads)));
  return launch(aligned ? reduce_splits<float4> : reduce_splits<float>, p, grid, kThreads, stream);
}

}  // namespace prefixcore::cuda
