// Scratch memory, and handing out work to a lent thread pool.
#pragma once

#include <new>

#include "parallel.h"
#include "vector.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

constexpr int64_t kAlignment = 64;
constexpr int64_t kTurns = 16;  // that each worker should at least have, so that they end together

// Uninitialised memory that frees itself. Allocated by the calling thread only, never by a worker,
// so that std::bad_alloc reaches the caller.
class Buffer {
 public:
  explicit Buffer(int64_t bytes)
      : data_(bytes > 0 ? ::operator new(static_cast<size_t>(bytes), std::align_val_t(kAlignment)) : nullptr) {}
  ~Buffer() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t(kAlignment));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_;
};

// Cuts aligned arrays from one piece of memory. Starting from null it only measures: the same
// constructor then tells how much memory a scratch needs and, given that much, lays it out.
class Carver {
 public:
  explicit Carver(char* base = nullptr) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ != nullptr ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return piece;
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// A unit of work, and what the same worker did before and does after: -1 for nothing.
struct Turn {
  int64_t previous, unit, next;
};

// Calls work(turn, scratch) once for every unit below `count`. Workers take the next units when they are done with
// some, so uneven units balance out; which worker does a unit never changes its result. Neighbours that read the same
// memory go to one worker, up to `together` of them, as long as there are enough for every worker to take some many
// times. Each holds an object of `Held` while it works.
struct Nothing {};
template <class Held = Nothing, class Work>
static void for_each_unit(const Parallel& parallel, int64_t count, int64_t scratch_bytes, Work& work,
                          int64_t together = 1) {
  if (count <= 0) return;
  const int64_t workers = max<int64_t>(1, min<int64_t>(parallel.num_threads, count));
  const int64_t step = max<int64_t>(1, min(together, count / (kTurns * workers)));
  const int64_t stride = round_up(scratch_bytes, kAlignment);
  Buffer scratch(workers * stride);
  int64_t next = 0;
  auto body = [&](int64_t begin, int64_t) {
    [[maybe_unused]] Held held;
    char* own = scratch.data() + begin * stride;  // no other call starts at `begin`
    int64_t first = __atomic_fetch_add(&next, step, __ATOMIC_RELAXED), before = -1;
    while (first < count) {
      const int64_t after = __atomic_fetch_add(&next, step, __ATOMIC_RELAXED);
      const int64_t last = min(first + step, count) - 1;
      for (int64_t unit = first; unit <= last; before = unit++)
        work(Turn{before, unit, unit < last ? unit + 1 : after < count ? after : -1}, own);
      first = after;
    }
  };
  parallel(workers, body);
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
