// Scratch memory, and handing out work to a lent thread pool.
#pragma once

#include <new>

#include "../parallel.h"
#include "../simd/vector.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

constexpr int64_t kAlignment = 64;

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

// Units of work that nobody has taken yet: a stretch of them. Its owner takes them in order, others from its end.
class Share {
 public:
  Share(int64_t begin, int64_t end) : bounds_(pack(begin, end)) {}

  // Either returns -1 if nothing is left.
  int64_t take_first() { return take(1, 0); }
  int64_t take_last() { return take(0, 1); }

 private:
  static uint64_t pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }

  int64_t take(int64_t first, int64_t last) {
    uint64_t now = __atomic_load_n(&bounds_, __ATOMIC_RELAXED);
    for (;;) {
      const auto begin = static_cast<int64_t>(now >> 32), end = static_cast<int64_t>(now & 0xffffffffu);
      if (begin >= end) return -1;
      if (__atomic_compare_exchange_n(&bounds_, &now, pack(begin + first, end - last), true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED))
        return first != 0 ? begin : end - 1;
    }
  }

  alignas(kAlignment) uint64_t bounds_;  // a cache line of its own
};

// A unit of work, and what the same worker did before and does after: -1 for nothing.
struct Turn {
  int64_t previous, unit, next;
};

struct Nothing {};

// Calls work(turn, scratch) once for every unit below `count`, which is less than 2^32. Each worker has a share of
// neighbours, which often read the same memory, and the same share every time, for it may still have that memory near;
// then it helps the others, so uneven units balance out. Which worker does a unit never changes its result. Each holds
// an object of `Held` while it works.
template <class Held = Nothing, class Work>
static void for_each_unit(const Parallel& parallel, int64_t count, int64_t scratch_bytes, Work& work) {
  if (count <= 0) return;
  const int64_t workers = max<int64_t>(1, min<int64_t>(parallel.num_threads, count));
  const int64_t stride = round_up(scratch_bytes, kAlignment), shares = workers * static_cast<int64_t>(sizeof(Share));
  Buffer memory(shares + workers * stride);
  auto* share = reinterpret_cast<Share*>(memory.data());
  for (int64_t i = 0; i < workers; ++i) new (share + i) Share(count * i / workers, count * (i + 1) / workers);
  auto body = [&](int64_t begin, int64_t) {  // no other call starts at `begin`
    [[maybe_unused]] Held held;
    char* own = memory.data() + shares + begin * stride;
    auto take = [&] {
      int64_t unit = share[begin].take_first();
      for (int64_t i = 1; unit < 0 && i < workers; ++i) unit = share[(begin + i) % workers].take_last();
      return unit;
    };
    int64_t before = -1, unit = take();
    while (unit >= 0) {
      const int64_t after = take();
      work(Turn{before, unit, after}, own);
      before = unit;
      unit = after;
    }
  };
  parallel(workers, body);
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
