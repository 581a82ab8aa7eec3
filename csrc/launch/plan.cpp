#include "plan.h"

#include <stdexcept>

namespace prefixcore::launch {
namespace {

constexpr int64_t kMostDimensions = 64;  // PyTorch's own limit

class Reader {
 public:
  Reader(const int64_t* words, int64_t count) : at_(words), end_(words + count) {}

  int64_t word() {
    if (at_ == end_) throw std::invalid_argument("a plan: expected more words");
    return *at_++;
  }

  int64_t count() {
    const int64_t n = word();
    if (n < 0 || n > end_ - at_) throw std::invalid_argument("a plan: expected as many words as it announces");
    return n;
  }

  int32_t value(int32_t values) {
    const int64_t n = word();
    if (n < 0 || n >= values)
      throw std::invalid_argument("a plan: expected one of its values, got " + std::to_string(n));
    return static_cast<int32_t>(n);
  }

  int64_t dimension() {
    const int64_t n = word();
    if (n < 0 || n >= kMostDimensions) throw std::invalid_argument("a plan: expected a dimension");
    return n;
  }

  std::vector<int64_t> words() {
    std::vector<int64_t> out(count());
    for (int64_t& x : out) x = word();
    return out;
  }

  View view(int32_t values) {
    View v;
    v.value = value(values);
    v.whole = word() != 0;
    if (v.whole) return v;
    v.offset = word();
    v.sizes = words();
    v.strides = words();
    if (v.sizes.size() != v.strides.size()) throw std::invalid_argument("a plan: expected a stride for each size");
    return v;
  }

  bool done() const { return at_ == end_; }

 private:
  const int64_t *at_, *end_;
};

Kernel read_kernel(Reader& in, int32_t arguments, int32_t values) {
  Kernel k;
  k.function = reinterpret_cast<void*>(in.word());  // NOLINT: a handle of the driver's
  k.grid = static_cast<uint32_t>(in.word());
  k.threads = static_cast<uint32_t>(in.word());
  k.shared = static_cast<uint32_t>(in.word());
  k.parameters.resize(in.count());
  for (Parameter& p : k.parameters) {
    p.kind = static_cast<Parameter::Kind>(in.word());
    switch (p.kind) {
      case Parameter::Kind::constant: p.bits = static_cast<uint64_t>(in.word()); break;
      case Parameter::Kind::address:
        p.value = in.value(values);
        p.bits = static_cast<uint64_t>(in.word());
        break;
      case Parameter::Kind::size:
      case Parameter::Kind::stride:
        p.value = in.value(arguments);
        p.bits = static_cast<uint64_t>(in.dimension());
        break;
      default: throw std::invalid_argument("a plan: expected a kind of parameter");
    }
  }
  return k;
}

Step read_step(Reader& in, int32_t arguments, int32_t values) {
  Step step;
  step.kind = static_cast<Step::Kind>(in.word());
  const int64_t makes = in.count();
  for (int64_t n = 0; n < makes; ++n) step.makes.push_back(in.value(values));
  switch (step.kind) {
    case Step::Kind::memory:
      step.memory.dtype = static_cast<int32_t>(in.word());
      step.memory.sizes = in.words();
      step.memory.strides = in.words();
      if (makes != 1 || step.memory.sizes.size() != step.memory.strides.size())
        throw std::invalid_argument("a plan: expected memory for one value, and a stride for each size");
      break;
    case Step::Kind::kernel: step.kernel = read_kernel(in, arguments, values); break;
    case Step::Kind::call: {
      step.call.number = in.word();
      const int64_t given = in.count();
      for (int64_t n = 0; n < given; ++n) step.call.arguments.push_back(in.view(values));
      break;
    }
    case Step::Kind::release: break;
    default: throw std::invalid_argument("a plan: expected a kind of step");
  }
  return step;
}

}  // namespace

Plan read_plan(const int64_t* words, int64_t count) {
  Reader in(words, count);
  Plan plan;
  plan.arguments = static_cast<int32_t>(in.word());
  plan.values = static_cast<int32_t>(in.word());
  if (plan.arguments < 0 || plan.values < plan.arguments)
    throw std::invalid_argument("a plan: expected its arguments among its values");
  const int64_t steps = in.count();
  for (int64_t n = 0; n < steps; ++n) plan.steps.push_back(read_step(in, plan.arguments, plan.values));
  const int64_t results = in.count();
  for (int64_t n = 0; n < results; ++n) plan.results.push_back(in.view(plan.values));
  if (!in.done()) throw std::invalid_argument("a plan: expected no more words");
  return plan;
}

}  // namespace prefixcore::launch
