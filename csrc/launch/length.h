// The number of keys in the signature of a call that decodes: a class of them, for a cache grows with each token.
//
// Kernels that decode take the number of keys, and strides that grow with it, as numbers; what else a plan holds (how
// many splits, how large they are, scratch) they make of `length_bucket` alone (`kernels/launch.py` has its twin). So
// one plan does for all lengths of a bucket. No torch.
#pragma once

#include <algorithm>
#include <cstdint>

namespace prefixcore::launch {

constexpr int64_t kDecodeQueries = 16;  // of a call that may have such a plan: `choose.DECODE_QUERIES`

// `keys` rounded up: to a multiple of 64, and above 512 of an eighth of the power of two that is not above it.
inline int64_t length_bucket(int64_t keys) {
  if (keys <= 0) return 0;
  int64_t power = 1;
  while (power <= keys / 2) power *= 2;
  const int64_t step = std::max<int64_t>(64, power / 8);
  return (keys + step - 1) / step * step;
}

// What Triton compiles other code for: 0, which may stand for a broadcast; 1; multiples of 16; what takes 64 bits.
inline int64_t number_class(int64_t n) {
  const int64_t wide = n > INT32_MAX ? 4 : 0;
  if (n == 0 || n == 1) return n;
  return (n % 16 == 0 ? 2 : 3) + wide;
}

}  // namespace prefixcore::launch
