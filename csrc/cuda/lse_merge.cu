#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"
#include "log_sum_exp.h"
#include "lse_merge.h"

namespace prefixcore::cuda {
namespace {

constexpr int kRows = 8;  // one warp each
constexpr int kThreads = 32 * kRows;

template <class Element, int kPack>
struct alignas(kPack * sizeof(Element)) Pack {
  Element x[kPack];
};

template <class Element, class Other, int kPack>  // kPack neighbours at a time where they are, and are aligned
__global__ void __launch_bounds__(kThreads) merge(LseMerge p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / 32;
  if (row >= p.batch * p.heads * p.queries) return;
  const int lane = threadIdx.x % 32;
  const int64_t t = row % p.queries, h = row / p.queries % p.heads, b = row / p.queries / p.heads;
  float* lse = p.lse + b * p.lse_stride[0] + h * p.lse_stride[1] + t * p.lse_stride[2];
  const float first = seen(*lse);
  const float second =
      seen(p.other_lse[b * p.other_lse_stride[0] + h * p.other_lse_stride[1] + t * p.other_lse_stride[2]]);
  const MergedRow merged = merge_rows(first, second);
  __syncwarp();  // all lanes have read what one now writes
  if (lane == 0) *lse = merged.lse;
  if (second == -INFINITY && first != -INFINITY) return;

  Element* out = static_cast<Element*>(p.out) + b * p.out_stride[0] + h * p.out_stride[1] + t * p.out_stride[2];
  const Other* other = static_cast<const Other*>(p.other_out) + b * p.other_out_stride[0] + h * p.other_out_stride[1] +
                       t * p.other_out_stride[2];
  const bool nothing = merged.lse == -INFINITY;
#pragma unroll 1  // a row is one or two turns of the loop
  for (int64_t d = lane * kPack; d < p.value_dim; d += 32 * kPack) {
    auto& here = *reinterpret_cast<Pack<Element, kPack>*>(out + d * p.out_stride[3]);
    const auto there = *reinterpret_cast<const Pack<Other, kPack>*>(other + d * p.other_out_stride[3]);
    Pack<Element, kPack> pack = here;
    for (int i = 0; i < kPack; ++i)
      pack.x[i] = Element(nothing ? 0.0f : merge_elements(float(pack.x[i]), float(there.x[i]), merged.share));
    here = pack;
  }
}

bool can_pack(const void* data, DType dtype, const int64_t (&stride)[4], int64_t pack) {
  bool can = reinterpret_cast<uintptr_t>(data) % (pack * size_of(dtype)) == 0 && stride[3] == 1;
  for (int d = 0; d < 3; ++d) can = can && stride[d] % pack == 0;
  return can;
}

template <class Element, class Other>
cudaError_t launch_merge(const LseMerge& p, cudaStream_t stream) {
  constexpr int kPack = 4;
  const bool packed = p.value_dim % kPack == 0 && can_pack(p.out, p.dtype, p.out_stride, kPack) &&
                      can_pack(p.other_out, p.other_dtype, p.other_out_stride, kPack);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.batch * p.heads * p.queries, kRows)));
  return launch(packed ? merge<Element, Other, kPack> : merge<Element, Other, 1>, p, grid, kThreads, stream);
}

template <class Element>
cudaError_t launch_half(const LseMerge& p, cudaStream_t stream) {
  if (p.other_dtype == DType::f32) return launch_merge<Element, float>(p, stream);
  return launch_merge<Element, Element>(p, stream);
}

}  // namespace

cudaError_t lse_merge(const LseMerge& p, cudaStream_t stream) {
  if (p.batch * p.heads * p.queries == 0) return cudaSuccess;
  switch (p.dtype) {
    case DType::bf16: return launch_half<__nv_bfloat16>(p, stream);
    case DType::f16: return launch_half<__half>(p, stream);
    default: return launch_merge<float, float>(p, stream);
  }
}

}  // namespace prefixcore::cuda
