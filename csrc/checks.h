// What the bindings of all devices expect of the tensors that they are given. The registered ops can be called without
// the Python layer, so nothing is taken for granted here: a kernel trusts every size, dtype and pointer.
#pragma once

#include <initializer_list>

#include "tensors.h"

namespace prefixcore {

using torch::headeronly::IntHeaderOnlyArrayRef;

// A size that a tensor must have, or any and the letter that stands for it.
struct Size {
  const char* letter;
  int64_t size = -1;
};

inline std::string text_of(std::initializer_list<Size> shape) {
  std::string text;
  for (const Size& s : shape) text += (text.empty() ? "" : ", ") + (s.size < 0 ? s.letter : std::to_string(s.size));
  return "[" + text + "]";
}

[[noreturn]] inline void refuse(const char* name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + got);
}

[[noreturn]] inline void refuse_storage(const char* name, const std::string& shape, int64_t needed, int64_t bytes) {
  refuse(name, "memory for the shape " + shape + ", " + std::to_string(needed) + " bytes",
         std::to_string(bytes) + " bytes: its storage was freed or shrunk; if FSDP shards it, unshard() it first");
}

// That the memory behind `t` holds its shape. Whoever frees a tensor's memory and keeps the tensor, as FSDP does with
// what it has sharded, leaves the shape as it was.
inline void check_storage(const Tensor& t, const char* name, IntHeaderOnlyArrayRef sizes) {
  int64_t *strides, last, step, needed, bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &last));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  bool overflows = false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return;
    overflows |= __builtin_mul_overflow(sizes[d] - 1, strides[d], &step) || __builtin_add_overflow(last, step, &last);
  }
  overflows |= __builtin_mul_overflow(last + 1, static_cast<int64_t>(t.element_size()), &needed);
  if (overflows) needed = INT64_MAX;
  if (needed > bytes) refuse_storage(name, text_of(sizes), needed, bytes);
}

inline void check_storage(const Tensor& t, const char* name) { check_storage(t, name, t.sizes()); }

// That `t` has this shape, and memory that holds it; returns its sizes.
inline const int64_t* check_shape(const Tensor& t, const char* name, std::initializer_list<Size> shape) {
  const IntHeaderOnlyArrayRef sizes = t.sizes();
  bool fits = sizes.size() == shape.size();
  for (size_t d = 0; fits && d < sizes.size(); ++d) {
    const int64_t wanted = shape.begin()[d].size;
    fits = wanted < 0 || sizes[d] == wanted;
  }
  if (!fits) refuse(name, text_of(shape), text_of(sizes));
  check_storage(t, name, sizes);
  return sizes.data();
}

inline bool is_integer(const Tensor& t) {
  const int32_t type = type_of(t);
  return type == aoti_torch_dtype_int64() || type == aoti_torch_dtype_int32();
}

inline void check_integer(const Tensor& t, const char* name) {
  if (!is_integer(t)) refuse(name, "int64 or int32", "another dtype");
}

// That `t` is one of the dtypes that are converted to float32 where they are read.
inline void check_floating(const Tensor& t, const char* name) {
  if (t.scalar_type() != ScalarType::Double) dtype_of(t, name);
}

inline void check_same_dtype(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  if (type_of(t) != type_of(other)) refuse(name, std::string("the dtype of ") + other_name, "another one");
}

}  // namespace prefixcore
