#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

// Where the linker puts the shared variables of all kernels.
extern "C" __attribute__((visibility("hidden"))) char __start_emulated_shared[], __stop_emulated_shared[];

namespace emulator {
namespace {

struct Fiber {
  std::vector<char> stack = std::vector<char>(128 * 1024);
  ucontext_t context;
  bool done = false;
};

std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
int current, num_threads, num_done;
bool moved;
const std::function<void()>* body;
std::vector<std::map<unsigned, Meeting>> meetings;
struct {
  int arrived = 0;
  uint64_t round = 0;
} barrier;
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

void run_block(int threads, const std::function<void()>& kernel) {
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  body = &kernel;
  num_threads = threads;
  num_done = 0;
  meetings.assign((threads + 31) / 32, {});
  barrier = {};
  const auto shared = static_cast<size_t>(__stop_emulated_shared - __start_emulated_shared);
  std::memset(__start_emulated_shared, 0xff, shared);  // NaN
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.done = false;
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

void __syncthreads() {
  using namespace emulator;
  ++barrier.arrived;
  progress();
  const uint64_t round = barrier.round;
  while (barrier.round == round) {
    if (barrier.arrived + num_done == num_threads) {
      barrier.arrived = 0;
      ++barrier.round;
      progress();
    } else {
      yield();
    }
  }
}

// --- what the binding asks of torch where there is a GPU ------------------------------------------

extern "C" {
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
int32_t aoti_torch_create_device_guard(int32_t, void** guard) { return *guard = nullptr, 0; }
int32_t aoti_torch_delete_device_guard(void*) { return 0; }

__attribute__((visibility("default"))) void emulator_options(bool hasty) { emulator::options = {hasty}; }
}
