// Reads what a plan depends on from a call's tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include "../tensors.h"
#include "plans.h"

namespace prefixcore::launch {

// What of a tensor is read while its signature is made.
struct Seen {
  char* address = nullptr;
  bool held = true;  // by the memory behind it: see csrc/checks.h
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

// Adds sizes, strides, dtype, device and alignment of `t` to the signature. Triton compiles other code for addresses
// that are multiples of 16, PyTorch chooses other kernels: nothing here distinguishes finer alignment.
inline Seen sign(const Tensor& tensor, Signature& signature) {
  AtenTensorHandle t = tensor.get();
  int64_t dim, *sizes, *strides;
  int32_t dtype, type, index;
  const void* address;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t, &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t, &index));
  if (!holds(t, dim, sizes, strides, dtype)) return {nullptr, false};
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(t, &address));
  signature.push_back(dim);
  signature.insert(signature.end(), sizes, sizes + dim);
  signature.insert(signature.end(), strides, strides + dim);
  signature.push_back(dtype | static_cast<int64_t>(type) << 16 | static_cast<int64_t>(index + 1) << 32);
  signature.push_back(static_cast<int64_t>(reinterpret_cast<uint64_t>(address) % 16));
  return {static_cast<char*>(const_cast<void*>(address)), true};  // NOLINT: kernels read what they are given
}

constexpr int64_t kNone = -1;  // in a tensor's place; no tensor has so many dimensions

}  // namespace prefixcore::launch
