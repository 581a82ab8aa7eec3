// The thread pool that a kernel is lent. Kernels split their work by its shape alone and never by
// the number of threads, so that the bits of a result do not depend on the machine.
#pragma once

#include <cstdint>

namespace prefixcore::cpu {

struct Parallel {
  // Calls body(context, begin, end) on ranges that cover [0, count) once, perhaps concurrently.
  void (*run)(int64_t count, void (*body)(void* context, int64_t begin, int64_t end), void* context);
  int32_t num_threads = 1;

  // body(begin, end): a callable that must outlive the call only.
  template <class Body>
  void operator()(int64_t count, Body& body) const {
    if (count > 0)
      run(count, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
  }
};

// Throws std::runtime_error: so many bytes of scratch memory could not be had.
[[noreturn]] void refuse_scratch(int64_t bytes);

}  // namespace prefixcore::cpu
