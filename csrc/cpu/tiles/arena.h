// Scratch memory: a buffer that frees itself, and an arena that lays arrays out in one.
#pragma once

#include <new>

#include "../parallel.h"
#include "../simd/vector.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

constexpr int64_t kAlignment = 64;

// Uninitialised memory that frees itself. Allocated by the calling thread only, never by a worker,
// so that the exception reaches the caller.
class Buffer {
 public:
  explicit Buffer(int64_t bytes)
      : data_(bytes > 0 ? ::operator new(static_cast<size_t>(bytes), std::align_val_t(kAlignment), std::nothrow)
                        : nullptr) {
    if (bytes > 0 && data_ == nullptr) refuse_scratch(bytes);
  }
  ~Buffer() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t(kAlignment));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_;
};

// Allocates aligned arrays from one piece of memory. Over null it only measures: the constructor of a scratch then
// tells how much memory the scratch needs and, given that much, lays it out.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}

  template <class T>
  T* allocate(int64_t count) {
    T* array = base_ != nullptr ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return array;
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
