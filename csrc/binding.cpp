// Registers the ops through torch's stable ABI, so that one build serves every torch from 2.10 on.
// Here tensors become views over raw memory, values are checked, outputs are allocated; the kernels
// know nothing of torch.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <new>
#include <tuple>

#include "attention_checks.h"
#include "cpu/embedding/embedding.h"
#include "cpu/isa.h"
#include "embedding_tensors.h"
#include "host.h"

namespace prefixcore {
namespace {

// --- tensors --------------------------------------------------------------------------------------

// [B, H, T, D] laid out as [B, T, H, D]: transposing it back for the output projection is free.
Tensor empty_heads_last(const Tensor& like, int64_t batch, int64_t heads, int64_t length, int64_t dim) {
  const Tensor memory = empty(like, type_of(like), {batch, length, heads, dim});
  const int64_t sizes[] = {batch, heads, length, dim};
  const int64_t strides[] = {memory.stride(0), memory.stride(2), memory.stride(1), memory.stride(3)};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(memory.get(), 4, sizes, strides, 0, &handle));
  return Tensor(handle);
}

// A gradient with the heads where its tensor has them, outside the tokens or inside: autograd copies any other order.
Tensor empty_gradient(const Tensor& t) {
  if (t.stride(1) > t.stride(2) || t.stride(3) != 1)
    return empty(t, type_of(t), {t.size(0), t.size(1), t.size(2), t.size(3)});
  return empty_heads_last(t, t.size(0), t.size(1), t.size(2), t.size(3));
}

std::vector<int64_t> integers(const Tensor& t) {
  std::vector<int64_t> out(t.numel());
  const int64_t step = t.dim() ? t.stride(0) : 1;
  if (t.scalar_type() == ScalarType::Int) {
    const int32_t* p = static_cast<const int32_t*>(t.const_data_ptr());
    for (size_t i = 0; i < out.size(); ++i) out[i] = p[i * step];
  } else {
    const int64_t* p = static_cast<const int64_t*>(t.const_data_ptr());
    for (size_t i = 0; i < out.size(); ++i) out[i] = p[i * step];
  }
  return out;
}

// --- the thread pool that kernels are lent --------------------------------------------------------

void run_parallel(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

void run_alone(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, count); }

// Waking the pool costs microseconds, and milliseconds on a busy machine: less work than this is done by the calling
// thread. Kernels give the same bits either way.
constexpr double kWorthSharing = 1 << 20;  // multiplications

cpu::Parallel pool(double multiplications) {
  if (multiplications < kWorthSharing) return {run_alone, 1};
  return {run_parallel, static_cast<int32_t>(torch::stable::get_num_threads())};
}

// --- prefix attention -----------------------------------------------------------------------------

// A tensor as kernels read it: itself, or a copy with contiguous rows. A copy of the handle would cost a small call.
class Rows {
 public:
  explicit Rows(const Tensor& t) : given_(t) {
    if (!has_rows(t)) copy_ = rows(t);
  }
  const Tensor& tensor() const { return copy_ ? *copy_ : given_; }

 private:
  const Tensor& given_;
  OptionalTensor copy_;
};

// A call's tensors, checked, and everything that a problem points to, kept alive together.
struct Inputs {
  const AttentionSizes sizes;
  const Rows query, key, value, prefix_key, prefix_value;
  const OptionalTensor &prefix_index, &prefix_lengths, &padding, &mask;
  OptionalTensor sinks;
  const OptionalTensor& cu_seqlens;
  std::vector<cpu::Sequence> sequences;

  Inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pk, const Tensor& pv,
         const OptionalTensor& index, const OptionalTensor& lengths, const OptionalTensor& pad, const OptionalTensor& m,
         const OptionalTensor& s, const OptionalTensor& cu, double scale, int64_t window, double softcap)
      : sizes(check_attention(q, k, v, pk, pv, index, lengths, pad, m, s, cu, scale, window, softcap)),
        query(q),
        key(k),
        value(v),
        prefix_key(pk),
        prefix_value(pv),
        prefix_index(index),
        prefix_lengths(lengths),
        padding(pad),
        mask(m),
        cu_seqlens(cu) {
    if (s) sinks = as_contiguous(as_float(*s));
    try {
      find_sequences();
    } catch (const std::bad_alloc&) {
      cpu::refuse_scratch(sizes.sequences * static_cast<int64_t>(sizeof(cpu::Sequence)));
    }
  }

  // Checks every value that the kernels index with, before any work.
  void find_sequences() {
    const int64_t bank = sizes.bank, capacity = sizes.capacity, queries = sizes.queries;
    std::vector<int64_t> lengths, ends, index;
    if (prefix_lengths) lengths = integers(*prefix_lengths);
    for (size_t n = 0; n < lengths.size(); ++n)
      if (lengths[n] < 0 || lengths[n] > capacity)
        throw std::invalid_argument("prefix_lengths[" + std::to_string(n) + "]: expected 0 to " +
                                    std::to_string(capacity) + ", got " + std::to_string(lengths[n]));
    if (cu_seqlens) {
      ends = integers(*cu_seqlens);
      bool rising = ends.front() == 0 && ends.back() == queries;
      for (size_t n = 1; n < ends.size(); ++n) rising = rising && ends[n - 1] <= ends[n];
      if (!rising)
        throw std::invalid_argument("cu_seqlens: expected a sequence rising from 0 to " + std::to_string(queries));
    }
    if (prefix_index) index = integers(*prefix_index);
    sequences.reserve(sizes.sequences);
    for (int64_t n = 0; n < sizes.sequences; ++n) {
      const int64_t entry = prefix_index ? index[n] : 0;
      if (entry < -1 || entry >= bank)
        throw std::out_of_range("prefix_index[" + std::to_string(n) + "]: expected -1 (none) to " +
                                std::to_string(bank - 1) + ", got " + std::to_string(entry));
      const int64_t length = entry < 0 ? 0 : prefix_lengths ? lengths[entry] : capacity;
      if (cu_seqlens)
        sequences.push_back({0, ends[n], ends[n + 1] - ends[n], ends[n], ends[n + 1] - ends[n], entry, length});
      else
        sequences.push_back({n, 0, queries, 0, sizes.keys, entry, length});
    }
  }

  // Of one of the products over queries and keys, as if nothing were masked.
  double multiplications() const {
    double pairs = 0;
    for (const cpu::Sequence& s : sequences)
      pairs += static_cast<double>(s.query_length) * static_cast<double>(s.key_length + s.prefix_length);
    return pairs * static_cast<double>(sizes.heads * sizes.dim);
  }

  void fill(cpu::AttentionProblem& p, bool causal, double scale, int64_t window, double softcap) const {
    p.sequences = sequences.data();
    p.num_sequences = static_cast<int64_t>(sequences.size());
    p.num_heads = sizes.heads;
    p.num_kv_heads = sizes.kv_heads;
    p.head_dim = sizes.dim;
    p.value_dim = sizes.value_dim;
    p.num_prefixes = sizes.bank;
    p.prefix_capacity = sizes.capacity;
    p.query = const_view(query.tensor(), "query");
    p.key = const_view(key.tensor(), "key");
    p.value = const_view(value.tensor(), "value");
    p.prefix_key = bank_view(prefix_key.tensor(), "prefix_key");
    p.prefix_value = bank_view(prefix_value.tensor(), "prefix_value");
    if (padding) {
      p.padding = static_cast<const uint8_t*>(padding->const_data_ptr());
      p.padding_stride[0] = padding->stride(0);
      p.padding_stride[1] = padding->stride(1);
    }
    if (mask) {
      const bool boolean = mask->scalar_type() == ScalarType::Bool;
      p.mask.kind = boolean ? cpu::Mask::Kind::boolean : cpu::Mask::Kind::additive;
      if (!boolean) p.mask.dtype = dtype_of(*mask, "attn_mask");
      p.mask.data = mask->const_data_ptr();
      for (int64_t d = 0; d < 4; ++d) p.mask.stride[d] = mask->stride(d);
    }
    if (sinks) p.sinks = static_cast<const float*>(sinks->const_data_ptr());
    p.causal = causal;
    p.scale = static_cast<float>(scale);
    p.sliding_window = std::min(window, kMost);  // the kernels count from tokens back to where a window begins
    p.softcap = static_cast<float>(softcap);
  }
};

std::tuple<Tensor, Tensor> prefix_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& prefix_key, const Tensor& prefix_value,
                                            const OptionalTensor& prefix_index, const OptionalTensor& prefix_lengths,
                                            const OptionalTensor& padding, const OptionalTensor& mask,
                                            const OptionalTensor& sinks, const OptionalTensor& cu_seqlens,
                                            bool is_causal, double scale, int64_t sliding_window, double softcap) {
  const Inputs inputs(query, key, value, prefix_key, prefix_value, prefix_index, prefix_lengths, padding, mask, sinks,
                      cu_seqlens, scale, sliding_window, softcap);
  const AttentionSizes& n = inputs.sizes;
  Tensor out = empty_heads_last(query, n.batch, n.heads, n.queries, n.value_dim);
  Tensor lse = empty_float(query, {n.batch, n.heads, n.queries});
  cpu::AttentionForwardProblem problem;
  inputs.fill(problem, is_causal, scale, sliding_window, softcap);
  problem.out = view(out, "out");
  problem.lse = static_cast<float*>(lse.mutable_data_ptr());
  problem.lse_stride[0] = lse.stride(0);
  problem.lse_stride[1] = lse.stride(1);
  cpu::kernels().attention.forward(problem, pool(2 * inputs.multiplications()));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_backward(
    Tensor grad_out, OptionalTensor grad_lse, Tensor out, Tensor lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& prefix_key, const Tensor& prefix_value, const OptionalTensor& prefix_index,
    const OptionalTensor& prefix_lengths, const OptionalTensor& padding, const OptionalTensor& mask,
    const OptionalTensor& sinks, const OptionalTensor& cu_seqlens, bool is_causal, double scale, int64_t sliding_window,
    double softcap, bool needs_query, bool needs_sequence, bool needs_prefix) {
  const Inputs inputs(query, key, value, prefix_key, prefix_value, prefix_index, prefix_lengths, padding, mask, sinks,
                      cu_seqlens, scale, sliding_window, softcap);
  check_outputs(grad_out, grad_lse, out, lse, query, inputs.sizes);
  grad_out = rows(grad_out);
  out = rows(out);
  lse = as_contiguous(lse);
  if (grad_lse) grad_lse = as_contiguous(as_float(*grad_lse));

  cpu::AttentionBackwardProblem problem;
  inputs.fill(problem, is_causal, scale, sliding_window, softcap);
  problem.out = const_view(out, "out");
  problem.grad_out = const_view(grad_out, "grad_out");
  problem.lse = static_cast<const float*>(lse.const_data_ptr());
  problem.lse_stride[0] = lse.stride(0);
  problem.lse_stride[1] = lse.stride(1);
  if (grad_lse) problem.grad_lse = static_cast<const float*>(grad_lse->const_data_ptr());

  const auto nothing = [&](bool single) {
    return empty(query, single ? aoti_torch_dtype_float32() : type_of(query), {0});
  };
  const auto float_like = [](const Tensor& t) { return empty_float(t, {t.sizes().begin(), t.sizes().end()}); };
  Tensor grad_query = needs_query ? empty_gradient(query) : nothing(false);
  Tensor grad_key = needs_sequence ? empty_gradient(key) : nothing(false);
  Tensor grad_value = needs_sequence ? empty_gradient(value) : nothing(false);
  Tensor grad_prefix_key = needs_prefix ? float_like(prefix_key) : nothing(true);
  Tensor grad_prefix_value = needs_prefix ? float_like(prefix_value) : nothing(true);
  if (needs_query) problem.grad_query = view(grad_query, "grad_query");
  if (needs_sequence) {
    problem.grad_key = view(grad_key, "grad_key");
    problem.grad_value = view(grad_value, "grad_value");
  }
  if (needs_prefix) {
    problem.grad_prefix_key = static_cast<float*>(grad_prefix_key.mutable_data_ptr());
    problem.grad_prefix_value = static_cast<float*>(grad_prefix_value.mutable_data_ptr());
  }
  cpu::kernels().attention.backward(problem, pool(5 * inputs.multiplications()));
  return {grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value};
}

// --- soft embedding -------------------------------------------------------------------------------

std::string place_of(int64_t flat, const Tensor& t) {
  std::string place;
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    place = std::to_string(flat % t.size(d)) + (place.empty() ? "" : ", ") + place;
    flat /= t.size(d);
  }
  return "[" + place + "]";
}

[[noreturn]] void refuse_ids(const Tensor& ids, const Tensor& original, int64_t vocabulary, int64_t num_virtual) {
  const int64_t* p = static_cast<const int64_t*>(ids.const_data_ptr());
  const int64_t limit = vocabulary + num_virtual, bad = cpu::first_bad_id(p, ids.numel(), limit);
  throw std::out_of_range("input_ids" + place_of(bad, original) + " is " + std::to_string(p[bad]) +
                          ", expected 0 <= id < " + std::to_string(limit) + " (" + std::to_string(vocabulary) +
                          " vocabulary rows and " + std::to_string(num_virtual) + " virtual tokens)");
}

constexpr double kRead = 1, kCopy = 2;  // as many multiplications take as long as reading, or copying, a byte

Tensor soft_embedding_cpu(const Tensor& input_ids, const Tensor& table, const Tensor& prompt) {
  check_embedding(input_ids, table, prompt);
  const Tensor ids = contiguous_ids(input_ids), weight = rows(table), virtual_rows = rows(prompt);
  Tensor out = empty_embedding(input_ids, weight);
  const EmbeddingForward problem = embedding_problem(ids, weight, virtual_rows, out);
  const double bytes = static_cast<double>(problem.count * problem.hidden * size_of(problem.out.dtype));
  if (!cpu::kernels().embedding.forward(problem, pool(kCopy * bytes)))
    refuse_ids(ids, input_ids, problem.vocabulary, problem.num_virtual);
  return out;
}

Tensor soft_embedding_backward_cpu(const Tensor& grad_out, const Tensor& input_ids, int64_t vocabulary,
                                   int64_t num_virtual) {
  check_embedding_backward(grad_out, input_ids, vocabulary, num_virtual);
  const Tensor ids = contiguous_ids(input_ids), grad = as_contiguous(grad_out);
  Tensor grad_virtual = empty_float(grad, {num_virtual, grad.size(grad.dim() - 1)});
  const EmbeddingBackward problem = embedding_problem(ids, grad, vocabulary, grad_virtual);
  if (problem.hidden == 0) return grad_virtual;  // nothing to sum, for as many rows as are asked for
  cpu::VirtualPlaces found;
  if (!found.find(problem)) refuse_ids(ids, input_ids, vocabulary, num_virtual);
  const double bytes =
      static_cast<double>(static_cast<int64_t>(found.places.size()) * problem.hidden * size_of(problem.grad_out.dtype));
  cpu::kernels().embedding.backward(problem, found.start.data(), found.places.data(), pool(kRead * bytes));
  return grad_virtual;
}

}  // namespace
}  // namespace prefixcore

STABLE_TORCH_LIBRARY(prefixcore, m) {
  m.def(
      "prefix_attention(Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, "
      "Tensor? prefix_index, Tensor? prefix_lengths, Tensor? padding, Tensor? mask, Tensor? sinks, "
      "Tensor? cu_seqlens, bool is_causal, float scale, int sliding_window, float softcap) -> (Tensor, Tensor)");
  m.def(
      "prefix_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor query, "
      "Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, Tensor? prefix_index, "
      "Tensor? prefix_lengths, Tensor? padding, Tensor? mask, Tensor? sinks, Tensor? cu_seqlens, bool is_causal, "
      "float scale, int sliding_window, float softcap, bool needs_query, bool needs_sequence, bool needs_prefix) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("soft_embedding(Tensor input_ids, Tensor weight, Tensor virtual) -> Tensor");
  m.def("soft_embedding_backward(Tensor grad, Tensor input_ids, int vocabulary, int num_virtual) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(prefixcore, CPU, m) {
  m.impl("prefix_attention", TORCH_BOX(&prefixcore::prefix_attention));
  m.impl("prefix_attention_backward", TORCH_BOX(&prefixcore::prefix_attention_backward));
  m.impl("soft_embedding", TORCH_BOX(&prefixcore::soft_embedding_cpu));
  m.impl("soft_embedding_backward", TORCH_BOX(&prefixcore::soft_embedding_backward_cpu));
}
