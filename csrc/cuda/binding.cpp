// Registers the CUDA kernels. The ops that only a GPU has are defined here, those of every device beside the CPU's.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../embedding_tensors.h"
#include "bank_decode.h"
#include "embedding.h"
#include "lse_merge.h"
#include "split_reduction.h"

// In libtorch_cuda, on which this library must not depend: it also loads where torch has no CUDA. So the symbol is
// weak, for whoever links it in, and otherwise looked up: torch does not load its libraries into the global scope.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace prefixcore::cuda {
namespace {

auto find_current_stream() {
  auto* function = &aoti_torch_get_current_cuda_stream;
  if (function == nullptr)
    if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD))
      function = reinterpret_cast<decltype(function)>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  if (function == nullptr)
    throw std::runtime_error("prefixcore: expected a PyTorch with CUDA, but libtorch_cuda.so is not loaded");
  return function;
}

// Launches on the device of `t` and on its current stream.
template <class Launch>
void on_device_of(const Tensor& t, const Launch& launch) {
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  void* stream = nullptr;
  static const auto current_stream = find_current_stream();
  TORCH_ERROR_CODE_CHECK(current_stream(t.get_device_index(), &stream));
  const cudaError_t error = launch(static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("prefixcore: CUDA error: ") + cudaGetErrorString(error));
}

// --- checks ---------------------------------------------------------------------------------------

using Sizes = std::vector<int64_t>;

std::string text_of(const Sizes& sizes) {
  std::string text = "[";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + "]";
}

Sizes sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

void expect(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

void expect_sizes(const Tensor& t, const char* name, const Sizes& sizes) {
  expect(sizes_of(t) == sizes,
         std::string(name) + ": expected the shape " + text_of(sizes) + ", got " + text_of(sizes_of(t)));
}

void expect_dim(const Tensor& t, const char* name, int64_t dim) {
  expect(t.dim() == dim,
         std::string(name) + ": expected " + std::to_string(dim) + " dimensions, got " + text_of(sizes_of(t)));
}

void expect_float(const Tensor& t, const char* name) {
  expect(t.scalar_type() == ScalarType::Float, std::string(name) + ": expected float32");
}

void expect_same_device(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  int32_t type, other_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(other.get(), &other_type));
  expect(type == other_type && t.get_device_index() == other.get_device_index(),
         std::string(name) + ": expected the device of " + other_name);
}

// --- soft embedding -------------------------------------------------------------------------------

Tensor soft_embedding(const Tensor& input_ids, const Tensor& table, const Tensor& prompt) {
  expect_same_device(input_ids, "input_ids", table, "weight");
  expect_same_device(prompt, "virtual", table, "weight");
  const Tensor ids = contiguous_ids(input_ids), weight = rows(table), virtual_rows = rows(prompt);
  Tensor out = empty_embedding(input_ids, weight);
  const EmbeddingForward problem = embedding_problem(ids, weight, virtual_rows, out);
  on_device_of(weight, [&](cudaStream_t stream) { return embedding_forward(problem, stream); });
  return out;
}

Tensor soft_embedding_backward(const Tensor& grad_out, const Tensor& input_ids, int64_t vocabulary,
                               int64_t num_virtual) {
  expect_same_device(input_ids, "input_ids", grad_out, "grad");
  const Tensor ids = contiguous_ids(input_ids), grad = as_contiguous(grad_out);
  Tensor grad_virtual = empty_float(grad, {num_virtual, grad.size(grad.dim() - 1)});
  const EmbeddingBackward problem = embedding_problem(ids, grad, vocabulary, grad_virtual);
  Tensor memory = empty(grad, aoti_torch_dtype_int64(), {embedding_backward_memory(problem)});
  on_device_of(grad, [&](cudaStream_t stream) {
    return embedding_backward(problem, static_cast<int64_t*>(memory.mutable_data_ptr()), stream);
  });
  return grad_virtual;
}

// --- split reduction ------------------------------------------------------------------------------

Tensor reduce_splits(const Tensor& splits, double scale) {
  expect(splits.dim() >= 1, "partials: expected a dimension for the splits, got a scalar");
  expect_float(splits, "partials");
  const Tensor partials = as_contiguous(splits);
  const Sizes sizes = sizes_of(partials);
  Tensor out = empty_float(partials, {sizes.begin() + 1, sizes.end()});
  SplitReduction p;
  p.partials = static_cast<const float*>(partials.const_data_ptr());
  p.splits = sizes[0];
  p.count = p.stride = out.numel();
  p.scale = static_cast<float>(scale);
  p.out = static_cast<float*>(out.mutable_data_ptr());
  on_device_of(partials, [&](cudaStream_t stream) { return split_reduction(p, stream); });
  return out;
}

// --- the merge of two partial results -------------------------------------------------------------

// Dimensions of size 1 have strides that mean nothing, and may stand in the way of wide loads.
template <size_t kDims>
void copy_strides(int64_t (&to)[kDims], const Tensor& t) {
  for (size_t d = 0; d < kDims; ++d) to[d] = t.size(d) == 1 ? (d == 3 ? 1 : 0) : t.stride(d);
}

void merge(Tensor out, Tensor lse, const Tensor& other_out, const Tensor& other_lse) {
  expect_dim(out, "out", 4);
  const Sizes sizes = sizes_of(out), row_sizes{sizes.begin(), sizes.end() - 1};
  expect_sizes(lse, "lse", row_sizes);
  expect_sizes(other_out, "other_out", sizes);
  expect_sizes(other_lse, "other_lse", row_sizes);
  expect_float(lse, "lse");
  expect_float(other_lse, "other_lse");
  expect_same_device(lse, "lse", out, "out");
  expect_same_device(other_out, "other_out", out, "out");
  expect_same_device(other_lse, "other_lse", out, "out");
  for (const Tensor* t : {&out, &lse})
    for (int64_t d = 0; d < t->dim(); ++d)
      expect(t->size(d) <= 1 || t->stride(d) != 0,
             "out and lse: expected memory of its own for every element, got an expanded tensor");
  LseMerge p;
  p.dtype = dtype_of(out, "out");
  p.other_dtype = dtype_of(other_out, "other_out");
  expect(p.other_dtype == p.dtype || p.other_dtype == DType::f32, "other_out: expected the dtype of out, or float32");
  p.batch = sizes[0];
  p.heads = sizes[1];
  p.queries = sizes[2];
  p.value_dim = sizes[3];
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.other_out = other_out.const_data_ptr();
  p.other_lse = static_cast<const float*>(other_lse.const_data_ptr());
  copy_strides(p.out_stride, out);
  copy_strides(p.lse_stride, lse);
  copy_strides(p.other_out_stride, other_out);
  copy_strides(p.other_lse_stride, other_lse);
  on_device_of(out, [&](cudaStream_t stream) { return lse_merge(p, stream); });
}

// --- decode over a prompt bank --------------------------------------------------------------------

// Every row begins at a multiple of sixteen bytes, as asynchronous copies ask. Only what does not is copied.
Tensor aligned_rows(const Tensor& t) {
  constexpr int64_t kElements = 16 / 2;
  const auto aligned = [&](const Tensor& x) {
    bool is = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && x.stride(x.dim() - 1) == 1;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) is = is && (x.size(d) == 1 || x.stride(d) % kElements == 0);
    return is;
  };
  if (aligned(t)) return t;
  const Tensor contiguous = torch::stable::contiguous(t);
  return aligned(contiguous) ? contiguous : torch::stable::clone(contiguous);
}

void expect_head_dim(int64_t dim, const char* name) {
  expect(dim >= 32 && dim <= 256 && dim % 16 == 0, std::string(name) +
                                                       ": expected a last dimension that is a multiple of 16 from 32 "
                                                       "to 256, got " +
                                                       std::to_string(dim) + ": use prefix_attention for others");
}

std::tuple<Tensor, Tensor> decode(const Tensor& all_queries, const Tensor& prefix_key, const Tensor& prefix_value,
                                  const OptionalTensor& prefix_index, const OptionalTensor& prefix_lengths,
                                  double scale) {
  expect_dim(all_queries, "query", 4);
  const ScalarType type = all_queries.scalar_type();
  expect(type == ScalarType::BFloat16 || type == ScalarType::Half,
         std::string("query: expected bfloat16 or float16, got ") + torch::headeronly::toString(type) +
             ": use prefix_attention for others");
  expect(prefix_key.scalar_type() == type, "prefix_key: expected the dtype of query");
  expect(prefix_value.scalar_type() == type, "prefix_value: expected the dtype of query");
  expect_same_device(prefix_key, "prefix_key", all_queries, "query");
  expect_same_device(prefix_value, "prefix_value", all_queries, "query");
  if (prefix_key.dim() != 3) expect_dim(prefix_key, "prefix_key", 4);
  Sizes value_sizes = sizes_of(prefix_key);
  if (prefix_value.dim() == prefix_key.dim()) value_sizes.back() = prefix_value.size(prefix_value.dim() - 1);
  expect_sizes(prefix_value, "prefix_value", value_sizes);

  const int64_t axis = prefix_key.dim() - 3;
  BankDecode p;
  p.batch = all_queries.size(0);
  p.heads = all_queries.size(1);
  p.queries = all_queries.size(2);
  p.head_dim = all_queries.size(3);
  p.bank = axis == 1 ? prefix_key.size(0) : 1;
  p.kv_heads = prefix_key.size(axis);
  p.capacity = prefix_key.size(axis + 1);
  p.value_dim = value_sizes.back();
  p.scale = static_cast<float>(scale);
  expect(prefix_key.size(axis + 2) == p.head_dim, "prefix_key: expected the last dimension of query, " +
                                                      std::to_string(p.head_dim) + ", got " +
                                                      text_of(sizes_of(prefix_key)));
  expect_head_dim(p.head_dim, "query");
  expect_head_dim(p.value_dim, "prefix_value");
  expect(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "query: expected a multiple of the prefix's " +
                                                          std::to_string(p.kv_heads) + " heads, got " +
                                                          std::to_string(p.heads));

  const Tensor query = aligned_rows(all_queries), key = aligned_rows(prefix_key), value = aligned_rows(prefix_value);
  p.query = const_view(query, "query");
  p.key = bank_view(key, "prefix_key");
  p.value = bank_view(value, "prefix_value");
  OptionalTensor index, lengths;
  const auto integers = [&](const OptionalTensor& t, const char* name, int64_t size, OptionalTensor& kept) {
    if (!t) return static_cast<const int64_t*>(nullptr);
    expect_sizes(*t, name, {size});
    expect_same_device(*t, name, query, "query");
    const ScalarType of = t->scalar_type();
    expect(of == ScalarType::Long || of == ScalarType::Int, std::string(name) + ": expected int64 or int32");
    kept = contiguous_ids(*t);
    return static_cast<const int64_t*>(kept->const_data_ptr());
  };
  p.prefix_index = integers(prefix_index, "prefix_index", p.batch, index);
  p.prefix_lengths = integers(prefix_lengths, "prefix_lengths", p.bank, lengths);

  Tensor out = empty_float(query, {p.batch, p.heads, p.queries, p.value_dim});
  Tensor lse = empty_float(query, {p.batch, p.heads, p.queries});
  p.out = static_cast<float*>(out.mutable_data_ptr());
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  on_device_of(query, [&](cudaStream_t stream) {
    const cudaError_t error = plan(p);
    if (error != cudaSuccess) return error;
    Tensor partial_out = empty_float(query, {p.splits, p.batch, p.heads, p.queries, p.value_dim});
    Tensor partial_lse = empty_float(query, {p.splits, p.batch, p.heads, p.queries});
    p.partial_out = static_cast<float*>(partial_out.mutable_data_ptr());
    p.partial_lse = static_cast<float*>(partial_lse.mutable_data_ptr());
    return bank_decode(p, stream);  // the allocator gives their memory to later work of this stream alone
  });
  return {out, lse};
}

}  // namespace
}  // namespace prefixcore::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(prefixcore, m) {
  m.def("split_reduction(Tensor partials, float scale) -> Tensor");
  m.def("lse_merge(Tensor(a!) out, Tensor(b!) lse, Tensor other_out, Tensor other_lse) -> ()");
  m.def(
      "bank_decode(Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor? prefix_index, "
      "Tensor? prefix_lengths, float scale) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(prefixcore, CUDA, m) {
  m.impl("soft_embedding", TORCH_BOX(&prefixcore::cuda::soft_embedding));
  m.impl("soft_embedding_backward", TORCH_BOX(&prefixcore::cuda::soft_embedding_backward));
  m.impl("split_reduction", TORCH_BOX(&prefixcore::cuda::reduce_splits));
  m.impl("lse_merge", TORCH_BOX(&prefixcore::cuda::merge));
  m.impl("bank_decode", TORCH_BOX(&prefixcore::cuda::decode));
}
