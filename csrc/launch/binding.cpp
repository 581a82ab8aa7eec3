// The ops `replay_*`: they take the arguments of the op of that name and the number of a state, and return what the
// plan of that signature computes; undefined tensors where there is none, and Python goes the ordinary way
// (`replay.py`).
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <exception>

#include "../host.h"
#include "plans.h"
#include "replay.h"
#include "signature.h"

namespace prefixcore::launch {
namespace {

// An op's arguments: t a tensor, o one that may be missing, b a bool, w any other word (a number), as they stand. And
// of an op that decodes, which dimension of each tensor counts the keys, if one does.
struct Op {
  const char* arguments;
  size_t results;
  const char* lengths;
};

constexpr Op kOps[] = {
    {"tttttoooooobwww"
     "w",
     2, "_22____13__"},  // prefix_attention
    {"tott"
     "tttttoooooobwww"
     "bbb"
     "w",
     5, nullptr},  // prefix_attention_backward
    {"ttt"
     "w",
     1, nullptr},  // soft_embedding
    {"ttww"
     "w",
     1, nullptr},  // soft_embedding_backward
};

// Of `prefix_attention`: places among its tensors and options.
constexpr size_t kQuery = 0, kKey = 1, kCuSeqlens = 10, kWindow = 2;

thread_local int64_t missed_ticket = 0;
thread_local std::string failure;

// Writes the signature that a call shares with those of other lengths; leaves it empty if the call does not decode.
void sign_any_length(int64_t op, const std::vector<Seen>& seen, const Signature& options, Signature& signature) {
  signature.clear();
  const char* lengths = kOps[op].lengths;
  if (lengths == nullptr || seen[kCuSeqlens].given || seen[kQuery].dim != 4 || seen[kKey].dim != 4) return;
  if (seen[kQuery].sizes[2] > kDecodeQueries) return;
  const int64_t keys = seen[kKey].sizes[2], window = options[kWindow];
  signature.push_back(-1 - op);  // the signature of one length begins with the op's own number
  signature.push_back(length_bucket(keys));
  signature.push_back(number_class(keys));
  signature.push_back(window > 0 && window < keys ? 1 : 0);  // whether it hides anything
  for (size_t n = 0; n < seen.size(); ++n) {
    if (!seen[n].given || lengths[n] == '_')
      sign(seen[n], signature);
    else
      sign_any_length(seen[n], lengths[n] - '0', keys, signature);
  }
  signature.insert(signature.end(), options.begin(), options.end());
}

// The results, or none. Sets `missed_ticket` if a plan is wanted.
std::vector<AtenTensorHandle> find_and_replay(int64_t op, const std::vector<Tensor>& tensors,
                                              const std::vector<bool>& given, const Signature& options) {
  missed_ticket = 0;
  thread_local Signature signature, any_length;
  thread_local std::vector<Seen> seen;
  seen.clear();
  for (size_t n = 0; n < tensors.size(); ++n) {
    seen.push_back(given[n] ? see(tensors[n]) : Seen{});
    if (!seen[n].held) return {};  // the ordinary way says what is wrong
  }
  sign_any_length(op, seen, options, any_length);
  Found found;
  if (!any_length.empty()) found = find(any_length);
  if (!found.plan) {
    signature.assign(1, op);
    for (const Seen& x : seen) sign(x, signature);
    signature.insert(signature.end(), options.begin(), options.end());
    found = find(signature);
    if (!found.known) missed_ticket = ask_for(signature, any_length);
    if (!found.plan) return {};
  }
  try {
    return replay(*found.plan, tensors, seen, tensors[0]);
  } catch (const std::exception& error) {  // the ordinary way then fails with the true error, or does not
    failure = error.what();
    failed(found.number);
    return {};
  }
}

template <int64_t kOp>
void run(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  const Op& op = kOps[kOp];
  if (num_arguments != std::strlen(op.arguments) || num_results != op.results)
    throw std::logic_error("prefixcore: an op and its schema differ");
  std::vector<Tensor> tensors;
  std::vector<bool> given;
  Signature options;
  tensors.reserve(num_arguments);
  static const Tensor* const none = new Tensor;  // never destroyed: torch may be gone by then
  for (uint64_t n = 0; n < num_arguments; ++n) {
    switch (op.arguments[n]) {
      case 't':
        tensors.push_back(torch::stable::detail::to<Tensor>(stack[n]));
        given.push_back(true);
        break;
      case 'o': {
        OptionalTensor t = torch::stable::detail::to<OptionalTensor>(stack[n]);
        given.push_back(t.has_value());
        tensors.push_back(t ? *std::move(t) : *none);
        break;
      }
      case 'b': options.push_back(torch::stable::detail::to<bool>(stack[n])); break;
      default: options.push_back(static_cast<int64_t>(stack[n]));
    }
  }
  std::vector<AtenTensorHandle> results = find_and_replay(kOp, tensors, given, options);
  for (uint64_t n = 0; n < num_results; ++n) {
    AtenTensorHandle result;
    if (results.empty()) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_new_uninitialized_tensor(&result));
    } else {
      result = results[n];
    }
    stack[n] = torch::stable::detail::from(result);
  }
}

}  // namespace
}  // namespace prefixcore::launch

// --- what the host module asks --------------------------------------------------------------------

int64_t prefixcore_plan_wanted() {
  const int64_t ticket = prefixcore::launch::missed_ticket;
  prefixcore::launch::missed_ticket = 0;
  return ticket;
}

int64_t prefixcore_plan_keep(int64_t ticket, const int64_t* words, int64_t count, int32_t any_length,
                             const char** problem) {
  *problem = nullptr;
  try {
    std::shared_ptr<const prefixcore::launch::Plan> plan;
    if (count > 0) plan = std::make_shared<prefixcore::launch::Plan>(prefixcore::launch::read_plan(words, count));
    return prefixcore::launch::keep(ticket, std::move(plan), any_length != 0);
  } catch (const std::exception& error) {
    thread_local std::string last;
    last = error.what();
    *problem = last.c_str();
    return 0;
  }
}

const char* prefixcore_plan_failure() {
  thread_local std::string last;
  last = std::move(prefixcore::launch::failure);
  prefixcore::launch::failure.clear();
  return last.c_str();
}

int64_t prefixcore_plans(prefixcore_kept_plan* plans, int64_t capacity) {
  const auto entries = prefixcore::launch::entries();
  for (int64_t n = 0; n < capacity && n < static_cast<int64_t>(entries.size()); ++n)
    plans[n] = {entries[n].number, entries[n].hits, entries[n].plan ? 1 : 0};
  return static_cast<int64_t>(entries.size());
}

int64_t prefixcore_length_bucket(int64_t keys) { return prefixcore::launch::length_bucket(keys); }
int64_t prefixcore_plans_limit() { return prefixcore::launch::limit(); }
void prefixcore_plans_set_limit(int64_t limit) { prefixcore::launch::set_limit(limit); }
void prefixcore_plans_forget() { prefixcore::launch::forget_all(); }

// --- registration ---------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_FRAGMENT(prefixcore, m) {
  m.def(
      "replay_prefix_attention(Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, "
      "Tensor? prefix_index, Tensor? prefix_lengths, Tensor? padding, Tensor? mask, Tensor? sinks, "
      "Tensor? cu_seqlens, bool is_causal, float scale, int sliding_window, float softcap, int state) "
      "-> (Tensor, Tensor)");
  m.def(
      "replay_prefix_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor query, "
      "Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, Tensor? prefix_index, "
      "Tensor? prefix_lengths, Tensor? padding, Tensor? mask, Tensor? sinks, Tensor? cu_seqlens, bool is_causal, "
      "float scale, int sliding_window, float softcap, bool needs_query, bool needs_sequence, bool needs_prefix, "
      "int state) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("replay_soft_embedding(Tensor input_ids, Tensor weight, Tensor virtual, int state) -> Tensor");
  m.def(
      "replay_soft_embedding_backward(Tensor grad, Tensor input_ids, int vocabulary, int num_virtual, int state) "
      "-> Tensor");
  m.def("call_of_plan(int number, Tensor[] tensors) -> Tensor[]");
}

// For CPU tensors too, on which the tests replay with a stand-in for the driver.
STABLE_TORCH_LIBRARY_IMPL(prefixcore, CUDA, m) {
  m.impl("replay_prefix_attention", &prefixcore::launch::run<0>);
  m.impl("replay_prefix_attention_backward", &prefixcore::launch::run<1>);
  m.impl("replay_soft_embedding", &prefixcore::launch::run<2>);
  m.impl("replay_soft_embedding_backward", &prefixcore::launch::run<3>);
}

STABLE_TORCH_LIBRARY_IMPL(prefixcore, CPU, m) {
  m.impl("replay_prefix_attention", &prefixcore::launch::run<0>);
  m.impl("replay_prefix_attention_backward", &prefixcore::launch::run<1>);
  m.impl("replay_soft_embedding", &prefixcore::launch::run<2>);
  m.impl("replay_soft_embedding_backward", &prefixcore::launch::run<3>);
}
