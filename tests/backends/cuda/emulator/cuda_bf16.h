#pragma once

#include <torch/headeronly/util/BFloat16.h>

struct __nv_bfloat16 {
  c10::BFloat16 value;

  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) : value(x) {}
  operator float() const { return static_cast<float>(value); }
};
