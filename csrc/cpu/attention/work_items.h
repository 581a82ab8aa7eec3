// Handing work items out to the threads of a lent pool.
#pragma once

#include "../parallel.h"
#include "../tiles/arena.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// A range of work items that nobody has taken yet. Its owner takes them from the front, in order; other workers steal
// from the back.
class StealableRange {
 public:
  StealableRange(int64_t begin, int64_t end) : bounds_(pack(begin, end)) {}

  // Either returns -1 if nothing is left.
  int64_t take() { return advance(1, 0); }
  int64_t steal() { return advance(0, 1); }

 private:
  static uint64_t pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }

  int64_t advance(int64_t front, int64_t back) {
    uint64_t now = __atomic_load_n(&bounds_, __ATOMIC_RELAXED);
    for (;;) {
      const auto begin = static_cast<int64_t>(now >> 32), end = static_cast<int64_t>(now & 0xffffffffu);
      if (begin >= end) return -1;
      if (__atomic_compare_exchange_n(&bounds_, &now, pack(begin + front, end - back), true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED))
        return front != 0 ? begin : end - 1;
    }
  }

  alignas(kAlignment) uint64_t bounds_;  // a cache line of its own
};

// The number of a work item, and of those that the same worker does before and after it; -1: none.
struct WorkItem {
  int64_t previous, index, next;
};

struct NoThreadState {};

// Calls work(item, scratch) once for each of `count` work items, which are fewer than 2^32. Each worker has a range of
// neighbours, because they often read the same memory, and the same range in every call, because its cache may still
// hold that memory. When its range is done it steals from the others, so uneven work items balance out. Which worker
// does an item never changes the item's result. Each worker holds a `ThreadState` while it works.
template <class ThreadState = NoThreadState, class Work>
static void for_each_work_item(const Parallel& parallel, int64_t count, int64_t scratch_bytes, Work& work) {
  if (count <= 0) return;
  const int64_t workers = max<int64_t>(1, min<int64_t>(parallel.num_threads, count));
  const int64_t stride = round_up(scratch_bytes, kAlignment);
  const int64_t range_bytes = workers * static_cast<int64_t>(sizeof(StealableRange));
  Buffer memory(range_bytes + workers * stride);
  auto* range = reinterpret_cast<StealableRange*>(memory.data());
  for (int64_t i = 0; i < workers; ++i) new (range + i) StealableRange(count * i / workers, count * (i + 1) / workers);
  auto body = [&](int64_t worker, int64_t) {  // the pool's ranges all begin elsewhere, so this one's begin names it
    [[maybe_unused]] ThreadState state;
    char* scratch = memory.data() + range_bytes + worker * stride;
    auto take = [&] {
      int64_t index = range[worker].take();
      for (int64_t i = 1; index < 0 && i < workers; ++i) index = range[(worker + i) % workers].steal();
      return index;
    };
    int64_t previous = -1, index = take();
    while (index >= 0) {
      const int64_t next = take();
      work(WorkItem{previous, index, next}, scratch);
      previous = index;
      index = next;
    }
  };
  parallel(workers, body);
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
