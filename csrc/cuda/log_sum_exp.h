// How two softmaxes over disjoint keys become one, a row at a time.
#pragma once

#include <cmath>

namespace prefixcore::cuda {

// ATen's flash kernel says +inf of a row that sees no key; here, as in every sum of exponentials, that is -inf.
__host__ __device__ inline float seen(float lse) { return lse == INFINITY ? -INFINITY : lse; }

// The log-sum-exp of both parts, and the second one's share of the output: out + share * (other - out).
struct MergedRow {
  float lse, share;
};

// A part that sees nothing has share 0 (or leaves the other 1) exactly: whatever stands in its output is not read.
__host__ __device__ inline MergedRow merge_rows(float lse, float other) {
  if (other == -INFINITY) return {lse, 0.0f};
  if (lse == -INFINITY) return {other, 1.0f};
  const float difference = other - lse;
  const float higher = difference > 0.0f ? other : lse;
  return {higher + log1pf(expf(-fabsf(difference))), 1.0f / (1.0f + expf(-difference))};
}

__host__ __device__ inline float merge_elements(float out, float other, float share) {
  if (share == 0.0f) return out;
  if (share == 1.0f) return other;
  return out + share * (other - out);
}

}  // namespace prefixcore::cuda
