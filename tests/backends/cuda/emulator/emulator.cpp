#include <ucontext.h>

#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
// The instructions that are only declared there are defined below.
#include "cuda/instructions.h"

// Where the linker puts the shared variables of all kernels.
extern "C" __attribute__((visibility("hidden"))) char __start_emulated_shared[], __stop_emulated_shared[];

namespace emulator {
namespace {

struct Copy {
  void* to;
  const void* from;
  bool inside;
};

struct Fiber {
  std::vector<char> stack = std::vector<char>(128 * 1024);
  ucontext_t context;
  bool done = false;
  std::vector<Copy> copies;               // since the last commit
  std::deque<std::vector<Copy>> pending;  // groups that were committed
};

std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
int current, num_threads, num_done;
bool moved;
const std::function<void()>* body;
std::vector<std::map<unsigned, Meeting>> meetings;
struct {
  int arrived = 0, votes = 0, result = 0;
  uint64_t turn = 0;
} barrier;
std::vector<uint4> shared;
std::string failure;  // of a fiber, whose stack no exception may leave

void fail(const char* what) {
  failure = what;
  swapcontext(&fibers[current]->context, &scheduler);
}

void run_fiber() {
  (*body)();
  fibers[current]->done = true;
  ++num_done;
  progress();
  swapcontext(&fibers[current]->context, &scheduler);
}

void land(const Copy& copy) {
  if (copy.inside)
    std::memcpy(copy.to, copy.from, 16);
  else
    std::memset(copy.to, 0, 16);
}

// Lets a fiber run until it waits.
void run(int thread) {
  if (fibers[thread]->done) return;
  current = thread;
  threadIdx = dim3(static_cast<unsigned>(thread), 0, 0);
  swapcontext(&scheduler, &fibers[thread]->context);
  if (!failure.empty()) throw std::logic_error(std::exchange(failure, {}));
}

}  // namespace

void progress() { moved = true; }
void yield() { swapcontext(&fibers[current]->context, &scheduler); }
int lane() { return current % 32; }
Meeting& meeting(unsigned mask) {
  if (!(mask >> lane() & 1)) fail("a lane calls with a mask that it is not in");
  return meetings[current / 32][mask];
}

void run_block(int threads, size_t dynamic_shared, const std::function<void()>& kernel) {
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  body = &kernel;
  num_threads = threads;
  num_done = 0;
  meetings.assign((threads + 31) / 32, {});
  barrier = {};
  shared.resize(dynamic_shared / sizeof(uint4));
  std::memset(static_cast<void*>(shared.data()), 0xff, dynamic_shared);  // NaN
  std::memset(__start_emulated_shared, 0xff, static_cast<size_t>(__stop_emulated_shared - __start_emulated_shared));
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.done = false;
    fiber.copies.clear();
    fiber.pending.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, run_fiber, 0);
  }
  // Who runs until all of them wait for others: everyone, or one warp.
  const int together = options.hasty ? 32 : threads;
  while (num_done < threads) {
    bool any = false;
    for (int first = 0; first < threads; first += together) {
      do {
        moved = false;
        for (int i = first; i < first + together && i < threads; ++i) run(options.hasty ? threads - 1 - i : i);
        any = any || moved;
      } while (moved);
    }
    if (!any) throw std::runtime_error("the emulated block waits for threads that never come");
  }
}

}  // namespace emulator

int __syncthreads_count(int predicate) {
  using namespace emulator;
  barrier.votes += predicate != 0;
  ++barrier.arrived;
  progress();
  const uint64_t turn = barrier.turn;
  while (barrier.turn == turn) {
    if (barrier.arrived + num_done == num_threads) {
      barrier.result = barrier.votes;
      barrier.arrived = barrier.votes = 0;
      ++barrier.turn;
      progress();
    } else {
      yield();
    }
  }
  return barrier.result;  // of this turn: the next one ends when every thread is there again
}

void __syncthreads() { __syncthreads_count(0); }

namespace prefixcore::cuda {

using emulator::fibers, emulator::current;

uint4* dynamic_shared() { return emulator::shared.data(); }

void copy_async(void* to, const void* from, bool inside) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    emulator::fail("an asynchronous copy that is not aligned to sixteen bytes");
  const emulator::Copy copy{to, from, inside};
  if (emulator::options.hasty)
    emulator::land(copy);
  else
    fibers[current]->copies.push_back(copy);
}

void commit_copies() {
  fibers[current]->pending.push_back(std::move(fibers[current]->copies));
  fibers[current]->copies.clear();
}

void wait_for_copies(int left) {
  auto& pending = fibers[current]->pending;
  for (; static_cast<int>(pending.size()) > left; pending.pop_front())
    for (const emulator::Copy& copy : pending.front()) emulator::land(copy);
}

namespace {

// --- what the PTX manual says of ldmatrix and mma.m16n8k16 ----------------------------------------

struct Four {
  uint32_t x[4];
};

// Lane l is told elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each matrix; transposed, of column l / 4.
Four load(const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("ldmatrix: a row that is not aligned to sixteen bytes");
  return emulator::meet<Four>(0xffffffffu, row, [&](const void* const* rows, Four* taken) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto element = [&](int r, int c) { return static_cast<const uint16_t*>(rows[matrix * 8 + r])[c]; };
        const int major = lane / 4, minor = lane % 4 * 2;
        const uint32_t first = transposed ? element(minor, major) : element(major, minor);
        const uint32_t second = transposed ? element(minor + 1, major) : element(major, minor + 1);
        taken[lane].x[matrix] = first | second << 16;
      }
  });
}

struct Factors {
  uint32_t a[4], b[2];
};

template <class Element>
float half_of(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(pair >> 16 * which);
  Element x;
  std::memcpy(static_cast<void*>(&x), &bits, 2);
  return x;
}

// Element a_i stands in row lane / 4 (i = 0, 1, 4, 5) or lane / 4 + 8, and in column 2 (lane % 4) + i % 2, from i = 4
// on eight further; b_i in row 2 (lane % 4) + i % 2, from i = 2 on eight further, and in column lane / 4; d_i in row
// lane / 4, from i = 2 on eight further, and in column 2 (lane % 4) + i % 2.
template <class Element>
void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Four sum = emulator::meet<Four>(
      0xffffffffu, Factors{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [](const Factors* brought, Four* taken) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 8; ++i)
            left[lane / 4 + (i % 4 >= 2 ? 8 : 0)][lane % 4 * 2 + i % 2 + (i >= 4 ? 8 : 0)] =
                half_of<Element>(brought[lane].a[i / 2], i % 2);
          for (int i = 0; i < 4; ++i)
            right[lane % 4 * 2 + i % 2 + (i >= 2 ? 8 : 0)][lane / 4] = half_of<Element>(brought[lane].b[i / 2], i % 2);
        }
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i) {
            float sum = 0.0f;
            for (int k = 0; k < 16; ++k) sum += left[lane / 4 + (i >= 2 ? 8 : 0)][k] * right[k][lane % 4 * 2 + i % 2];
            std::memcpy(&taken[lane].x[i], &sum, 4);
          }
      });
  for (int i = 0; i < 4; ++i) {
    float part;
    std::memcpy(&part, &sum.x[i], 4);
    d[i] += part;
  }
}

}  // namespace

void load_matrices(uint32_t (&m)[4], const void* row) {
  const Four four = load(row, false);
  std::memcpy(m, four.x, sizeof(m));
}
void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  const Four four = load(row, true);
  std::memcpy(m, four.x, sizeof(m));
}
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  product<__half>(d, a, b0, b1);
}
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  product<__nv_bfloat16>(d, a, b0, b1);
}

}  // namespace prefixcore::cuda

// --- what the binding asks of torch where there is a GPU ------------------------------------------

extern "C" {
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
int32_t aoti_torch_create_device_guard(int32_t, void** guard) { return *guard = nullptr, 0; }
int32_t aoti_torch_delete_device_guard(void*) { return 0; }

__attribute__((visibility("default"))) void emulator_options(bool hasty, int processors) {
  emulator::options = {hasty, processors};
}
}
