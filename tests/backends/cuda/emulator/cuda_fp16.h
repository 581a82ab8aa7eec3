#pragma once

#include <torch/headeronly/util/Half.h>

struct __half {
  c10::Half value;

  __half() = default;
  explicit __half(float x) : value(x) {}
  operator float() const { return static_cast<float>(value); }
};
