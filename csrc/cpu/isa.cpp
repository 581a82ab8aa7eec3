#include "isa.h"

#ifdef PREFIXCORE_X86
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../host.h"

namespace prefixcore::cpu {

extern const Kernels kernels_baseline;
#ifdef PREFIXCORE_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_amx;
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool runnable;
};

constexpr int kMostCandidates = 5;

#ifdef PREFIXCORE_X86
// Whether the CPU multiplies tiles of bfloat16, and Linux lets this process use their registers once it has asked.
bool may_use_tiles() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBfloat16) || !(d & kTiles)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best first. __builtin_cpu_supports also asks whether the operating system saves the registers.
int candidates(Candidate (&list)[kMostCandidates]) {
  int count = 0;
#ifdef PREFIXCORE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const Candidate pairs{&kernels_avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16")};
  // Intel's CPUs multiply no more numbers a second by pairs than in float32, so packing the pairs gains nothing.
  const bool slow_pairs = __builtin_cpu_is("intel");
  list[count++] = {&kernels_amx, pairs.runnable && may_use_tiles()};
  if (!slow_pairs) list[count++] = pairs;
  list[count++] = {&kernels_avx512, avx512};
  if (slow_pairs) list[count++] = pairs;
  list[count++] = {&kernels_avx2, avx2};
#endif
  list[count++] = {&kernels_baseline, true};
  return count;
}

std::atomic<const Kernels*> selected{nullptr};

const Kernels* find(const char* name) {
  Candidate list[kMostCandidates];
  const int count = candidates(list);
  for (int i = 0; i < count; ++i) {
    if (name == nullptr ? list[i].runnable : std::strcmp(name, list[i].kernels->isa) == 0) {
      if (!list[i].runnable)
        throw std::runtime_error(std::string("this machine cannot run the instruction set '") + name + "'");
      return list[i].kernels;
    }
  }
  std::string known;
  for (int i = 0; i < count; ++i) known += std::string(i ? ", " : "") + list[i].kernels->isa;
  throw std::runtime_error(std::string("unknown instruction set '") + name + "' (PREFIXCORE_ISA): use one of " + known);
}

}  // namespace

const Kernels& kernels() {
  const Kernels* table = selected.load(std::memory_order_acquire);
  if (table == nullptr) {
    const char* forced = std::getenv("PREFIXCORE_ISA");
    table = find(forced && *forced ? forced : nullptr);
    selected.store(table, std::memory_order_release);
  }
  return *table;
}

void select_isa(const char* name) { selected.store(find(name), std::memory_order_release); }

int32_t runnable_isas(const char** names, int32_t capacity) {
  Candidate list[kMostCandidates];
  const int count = candidates(list);
  int32_t found = 0;
  for (int i = 0; i < count; ++i)
    if (list[i].runnable && found < capacity) names[found++] = list[i].kernels->isa;
  return found;
}

// Here, where no instruction set is named: an inline function of the standard library that a kernel's file compiles may
// stand in for everybody's.
void refuse_scratch(int64_t bytes) {
  throw std::runtime_error("prefixcore: out of memory: " + std::to_string(bytes) +
                           " bytes of scratch memory; use a smaller batch or shorter sequences");
}

}  // namespace prefixcore::cpu

extern "C" {

const char* prefixcore_isa() {
  try {
    return prefixcore::cpu::kernels().isa;
  } catch (const std::exception&) {
    return "none";  // PREFIXCORE_ISA names something this machine cannot run; the ops raise, this only tells
  }
}

const char* prefixcore_select_isa(const char* name) {
  thread_local std::string problem;
  try {
    prefixcore::cpu::select_isa(name);
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}

int32_t prefixcore_runnable_isas(const char** names, int32_t capacity) {
  return prefixcore::cpu::runnable_isas(names, capacity);
}
}
