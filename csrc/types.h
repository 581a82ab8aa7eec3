// The vocabulary shared by every kernel, whatever the device: plain data, no torch header.
#pragma once

#include <cstdint>

namespace prefixcore {

enum class DType : int32_t { f32, bf16, f16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// A strided tensor whose last dimension is contiguous. Strides count elements; dimensions that a
// tensor lacks have stride 0. `data == nullptr` means "not given".
struct ConstView {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride[3] = {0, 0, 0};
};

struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride[3] = {0, 0, 0};
};

}  // namespace prefixcore
