#include "replay.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <optional>

namespace prefixcore::launch {
namespace {

void check(AOTITorchError error, const char* what) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("prefixcore: ") + what + " failed");
}

// The values of one replay. Those that it makes are its own.
class Values {
 public:
  Values(const Plan& plan, const std::vector<Tensor>& arguments, const std::vector<Seen>& seen)
      : given_(plan.arguments), handles_(plan.values, nullptr), addresses_(plan.values, nullptr) {
    for (size_t n = 0; n < arguments.size(); ++n) {
      handles_[n] = arguments[n].get();
      addresses_[n] = seen[n].address;
      sizes_.push_back(seen[n].sizes);
      strides_.push_back(seen[n].strides);
    }
  }
  Values(const Values&) = delete;
  Values& operator=(const Values&) = delete;
  ~Values() {
    for (size_t n = given_; n < handles_.size(); ++n) release(n);
  }

  Operands operands() const { return {addresses_.data(), sizes_.data(), strides_.data()}; }

  void put(int32_t value, AtenTensorHandle handle) {
    handles_[value] = handle;
    void* address;
    check(aoti_torch_get_data_ptr(handle, &address), "finding memory");
    addresses_[value] = static_cast<char*>(address);
  }

  void release(size_t value) {
    if (handles_[value] != nullptr) aoti_torch_delete_tensor_object(handles_[value]);
    handles_[value] = nullptr;
  }

  AtenTensorHandle view(const View& v) const {
    AtenTensorHandle out;
    if (v.whole)
      check(aoti_torch_new_tensor_handle(handles_[v.value], &out), "a view");
    else
      check(aoti_torch__reinterpret_tensor(handles_[v.value], static_cast<int64_t>(v.sizes.size()), v.sizes.data(),
                                           v.strides.data(), v.offset, &out),
            "a view");
    return out;
  }

 private:
  size_t given_;
  std::vector<AtenTensorHandle> handles_;
  std::vector<char*> addresses_;
  std::vector<const int64_t*> sizes_, strides_;  // of the arguments
};

// Calls what Python knows by its number, by way of an op that is implemented there.
void call(const Step& step, Values& values) {
  StableListHandle list;
  check(torch_new_list_reserve_size(step.call.arguments.size(), &list), "a list");
  for (const View& argument : step.call.arguments)
    check(torch_list_push_back(list, torch::stable::detail::from(values.view(argument))), "a list");
  StableIValue stack[2] = {torch::stable::detail::from(step.call.number), torch::stable::detail::from(list)};
  check(torch_call_dispatcher("prefixcore::call_of_plan", "", stack, TORCH_ABI_VERSION), "a call of the plan's");
  const auto results = torch::stable::detail::to<StableListHandle>(stack[0]);
  size_t count = 0;
  check(torch_list_size(results, &count), "a list");
  for (size_t n = 0; n < count; ++n) {
    StableIValue result;
    check(torch_list_get_item(results, n, &result), "a list");
    const auto handle = torch::stable::detail::to<AtenTensorHandle>(result);
    if (n < step.makes.size())
      values.put(step.makes[n], handle);
    else
      aoti_torch_delete_tensor_object(handle);
  }
  torch_delete_list(results);
  if (count != step.makes.size()) throw std::runtime_error("prefixcore: expected another number of results");
}

}  // namespace

std::vector<AtenTensorHandle> replay(const Plan& plan, const std::vector<Tensor>& arguments,
                                     const std::vector<Seen>& seen, const Tensor& like) {
  if (arguments.size() != static_cast<size_t>(plan.arguments) || seen.size() != arguments.size())
    throw std::runtime_error("prefixcore: expected as many tensors as the plan has arguments");
  int32_t type, device;
  check(aoti_torch_get_device_type(like.get(), &type), "finding the device");
  check(aoti_torch_get_device_index(like.get(), &device), "finding the device");
  const bool cuda = type == aoti_torch_device_type_cuda();
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (cuda) guard.emplace(device);
  const Target target = target_for(cuda, device);

  Values values(plan, arguments, seen);
  for (const Step& step : plan.steps) {
    switch (step.kind) {
      case Step::Kind::memory: {
        const Memory& m = step.memory;
        AtenTensorHandle handle;
        check(aoti_torch_empty_strided(static_cast<int64_t>(m.sizes.size()), m.sizes.data(), m.strides.data(), m.dtype,
                                       type, device, &handle),
              "an allocation");
        values.put(step.makes[0], handle);
        break;
      }
      case Step::Kind::kernel: run_kernel(step.kernel, values.operands(), target); break;
      case Step::Kind::call: call(step, values); break;
      case Step::Kind::release:
        for (const int32_t value : step.makes) values.release(value);
        break;
    }
  }
  std::vector<AtenTensorHandle> results;
  results.reserve(plan.results.size());
  for (const View& result : plan.results) results.push_back(values.view(result));
  return results;
}

}  // namespace prefixcore::launch
