// Reads what a plan depends on from a call's tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include "../tensors.h"
#include "length.h"
#include "plans.h"

namespace prefixcore::launch {

// What of a tensor is read while its signature is made. The arrays are the tensor's own.
struct Seen {
  bool given = false;
  bool held = true;  // by the memory behind it: see csrc/checks.h
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t kind = 0;  // dtype and device
  char* address = nullptr;
};

// Whether the memory behind `t` holds its shape. It is not part of the signature, for it may change between two calls.
inline bool holds(AtenTensorHandle t, int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  int64_t last, step, bytes, needed;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t, &last));
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 0) return true;
    if (__builtin_mul_overflow(sizes[d] - 1, strides[d], &step) || __builtin_add_overflow(last, step, &last))
      return false;
  }
  if (__builtin_mul_overflow(last + 1, static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)), &needed))
    return false;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t, &bytes));
  return needed <= bytes;
}

inline Seen see(const Tensor& tensor) {
  AtenTensorHandle t = tensor.get();
  Seen seen;
  seen.given = true;
  int64_t *sizes, *strides;
  int32_t dtype, type, index;
  const void* address;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t, &seen.dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t, &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t, &index));
  seen.sizes = sizes;
  seen.strides = strides;
  seen.kind = dtype | static_cast<int64_t>(type) << 16 | static_cast<int64_t>(index + 1) << 32;
  seen.held = holds(t, seen.dim, sizes, strides, dtype);
  if (!seen.held) return seen;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(t, &address));
  seen.address = static_cast<char*>(const_cast<void*>(address));  // NOLINT: kernels read what they are given
  return seen;
}

constexpr int64_t kNone = -1;    // in a tensor's place; no tensor has so many dimensions
constexpr int64_t kLength = -2;  // in the place of a size that is the number of keys

// Triton compiles other code for addresses that are multiples of 16, PyTorch chooses other kernels: nothing here
// distinguishes finer alignment.
inline int64_t alignment(const Seen& x) { return static_cast<int64_t>(reinterpret_cast<uint64_t>(x.address) % 16); }

// Adds sizes, strides, dtype, device and alignment to the signature.
inline void sign(const Seen& x, Signature& signature) {
  if (!x.given) {
    signature.push_back(kNone);
    return;
  }
  signature.push_back(x.dim);
  signature.insert(signature.end(), x.sizes, x.sizes + x.dim);
  signature.insert(signature.end(), x.strides, x.strides + x.dim);
  signature.push_back(x.kind);
  signature.push_back(alignment(x));
}

// The same of a tensor whose dimension `length` counts the keys: that size stands for any number, and strides for those
// of their class. But for the stride after it, within a row, by which it is decided whether rows are copied.
inline void sign_any_length(const Seen& x, int64_t length, int64_t keys, Signature& signature) {
  signature.push_back(x.dim);
  for (int64_t d = 0; d < x.dim; ++d) signature.push_back(d == length && x.sizes[d] == keys ? kLength : x.sizes[d]);
  for (int64_t d = 0; d < x.dim; ++d) signature.push_back(d == length + 1 ? x.strides[d] : number_class(x.strides[d]));
  signature.push_back(x.kind);
  signature.push_back(alignment(x));
}

}  // namespace prefixcore::launch
