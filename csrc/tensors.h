// What the bindings of all devices do with tensors: views over their memory for the kernels, new ones for the results.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "types.h"

namespace prefixcore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: throw std::invalid_argument(std::string(name) + ": expected float32, bfloat16 or float16");
  }
}

// Every one of torch::stable's functions looks an operator up by its name, boxes its arguments and dispatches: a
// microsecond, which a small call feels. So they are called where there is something to do, and not to find out.

template <class Sizes>
std::string text_of(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// The stable ABI hands on that an allocation failed, and not how much was asked for.
template <class Sizes>
[[noreturn]] void refuse_memory(const Sizes& sizes, int32_t dtype) {
  const auto element = static_cast<double>(aoti_torch_dtype_element_size(dtype));
  double bytes = element;
  for (const int64_t size : sizes) bytes *= static_cast<double>(size);
  char text[96];
  std::snprintf(text, sizeof text, "%.0f bytes (%.1f GiB)", bytes, bytes / (1 << 30));
  throw std::runtime_error("prefixcore: out of memory: a tensor " + text_of(sizes) + " of " +
                           std::to_string(static_cast<int>(element)) + "-byte numbers needs " + text +
                           "; use a smaller batch or shorter sequences");
}

template <class Copy>
Tensor copied(const Tensor& t, int32_t dtype, const Copy& copy) {
  try {
    return copy();
  } catch (const std::exception&) {
    refuse_memory(t.sizes(), dtype);
  }
}

inline int32_t type_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : copied(t, type_of(t), [&] { return torch::stable::contiguous(t); });
}

inline Tensor as_float(const Tensor& t) {
  const int32_t dtype = aoti_torch_dtype_float32();
  return type_of(t) == dtype ? t : copied(t, dtype, [&] { return torch::stable::to(t, ScalarType::Float); });
}

inline Tensor as_long(const Tensor& t) {
  const int32_t dtype = aoti_torch_dtype_int64();
  return type_of(t) == dtype ? t : copied(t, dtype, [&] { return torch::stable::to(t, ScalarType::Long); });
}

// Kernels read rows: the last dimension must be contiguous. Only what is not is copied.
inline bool has_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1;
}

inline Tensor rows(const Tensor& t) {
  return has_rows(t) ? t : copied(t, type_of(t), [&] { return torch::stable::contiguous(t); });
}

inline ConstView const_view(const Tensor& t, const char* name) {
  ConstView v{t.const_data_ptr(), dtype_of(t, name), {0, 0, 0}};
  for (int64_t d = 0; d + 1 < t.dim(); ++d) v.stride[d] = t.stride(d);
  return v;
}

// A prefix without a bank's dimension is a bank of one.
inline ConstView bank_view(const Tensor& t, const char* name) {
  const ConstView v = const_view(t, name);
  return t.dim() == 4 ? v : ConstView{v.data, v.dtype, {0, v.stride[0], v.stride[1]}};
}

inline View view(Tensor& t, const char* name) {
  View v{t.mutable_data_ptr(), dtype_of(t, name), {0, 0, 0}};
  for (int64_t d = 0; d + 1 < t.dim(); ++d) v.stride[d] = t.stride(d);
  return v;
}

// A new contiguous tensor on the device of `like`.
inline Tensor empty(const Tensor& like, int32_t dtype, const std::vector<int64_t>& sizes) {
  AtenTensorHandle handle;
  if (aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &dtype, nullptr, nullptr,
                                0, nullptr, &handle) != TORCH_SUCCESS)
    refuse_memory(sizes, dtype);
  return Tensor(handle);
}

inline Tensor empty_float(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty(like, aoti_torch_dtype_float32(), sizes);
}

}  // namespace prefixcore
