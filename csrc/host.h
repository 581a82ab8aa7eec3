// The few facts that the op library tells the pybind11 module, as a C interface between the two.
#pragma once

#include <cstdint>

#define PREFIXCORE_EXPORT __attribute__((visibility("default")))

extern "C" {
PREFIXCORE_EXPORT const char* prefixcore_isa();
// nullptr, or what is wrong with that name (valid until the next call on this thread).
PREFIXCORE_EXPORT const char* prefixcore_select_isa(const char* name);
PREFIXCORE_EXPORT int32_t prefixcore_runnable_isas(const char** names, int32_t capacity);
}
