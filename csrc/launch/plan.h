// What the first call of a signature found out, as plain data: the steps that do the same for other tensors. No torch.
//
// A plan works on values, numbered: the arguments of the call that are tensors come first, then what its steps make.
// Where they lie in memory is not part of it. It comes from Python as a list of integers (`plan.py` writes it).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace prefixcore::launch {

// A value, or a view of it; strides and offset count elements.
struct View {
  int32_t value = 0;
  bool whole = true;
  int64_t offset = 0;
  std::vector<int64_t> sizes, strides;
};

// A kernel's parameter: an address `bits` bytes into a value; a constant; or the size or stride of an argument's
// dimension `bits`, which may differ from call to call.
struct Parameter {
  enum class Kind : int64_t { address = 0, constant = 1, size = 2, stride = 3 };
  Kind kind = Kind::constant;
  int32_t value = 0;
  uint64_t bits = 0;
};

struct Kernel {
  void* function = nullptr;
  uint32_t grid = 0, threads = 0, shared = 0;
  std::vector<Parameter> parameters;
};

struct Memory {
  int32_t dtype = 0;
  std::vector<int64_t> sizes, strides;
};

// A call of something that is not ours, which Python knows by its number.
struct Call {
  int64_t number = 0;
  std::vector<View> arguments;
};

struct Step {
  enum class Kind : int64_t { memory = 1, kernel = 2, call = 3, release = 4 };
  Kind kind = Kind::release;
  std::vector<int32_t> makes;  // memory: one value; call: its results; release: what nobody needs any more
  Memory memory;
  Kernel kernel;
  Call call;
};

struct Plan {
  int32_t arguments = 0, values = 0;
  std::vector<Step> steps;
  std::vector<View> results;
};

// The plan that `words` spell; std::invalid_argument if they spell none.
Plan read_plan(const int64_t* words, int64_t count);

}  // namespace prefixcore::launch
