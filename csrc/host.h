// The few facts that the op library tells the pybind11 module, as a C interface between the two.
#pragma once

#include <cstdint>

#define PREFIXCORE_EXPORT __attribute__((visibility("default")))

extern "C" {
PREFIXCORE_EXPORT const char* prefixcore_isa();
// nullptr, or what is wrong with that name (valid until the next call on this thread).
PREFIXCORE_EXPORT const char* prefixcore_select_isa(const char* name);
PREFIXCORE_EXPORT int32_t prefixcore_runnable_isas(const char** names, int32_t capacity);

// Plans of GPU calls (csrc/launch/): what Python records and is told.
struct prefixcore_kept_plan {
  int64_t number, hits;
  int32_t has_plan;  // 0: calls of this signature go by Python
};
// The ticket of the last call on this thread that found its signature unknown, once; 0 if it was known.
PREFIXCORE_EXPORT int64_t prefixcore_plan_wanted();
// Keeps a plan, or with no words that there is none; returns its number, or 0 and perhaps what is wrong with it. With
// `any_length` it also does for calls of other lengths, if the call that asked for it decodes.
PREFIXCORE_EXPORT int64_t prefixcore_plan_keep(int64_t ticket, const int64_t* words, int64_t count, int32_t any_length,
                                               const char** problem);
// The length for which such a plan is made.
PREFIXCORE_EXPORT int64_t prefixcore_length_bucket(int64_t keys);
// Why the last replay on this thread failed, once; empty if it did not.
PREFIXCORE_EXPORT const char* prefixcore_plan_failure();
// Fills in as many as there is room for, and returns how many there are, the last used first.
PREFIXCORE_EXPORT int64_t prefixcore_plans(prefixcore_kept_plan* plans, int64_t capacity);
PREFIXCORE_EXPORT int64_t prefixcore_plans_limit();
PREFIXCORE_EXPORT void prefixcore_plans_set_limit(int64_t limit);
PREFIXCORE_EXPORT void prefixcore_plans_forget();
}
