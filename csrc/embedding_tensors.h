// Soft embedding's tensors as the problems that kernels take, whatever the device.
#pragma once

#include <cstdint>

#include "checks.h"
#include "embedding.h"

namespace prefixcore {

// The ids as contiguous int64 (they are small: converting them costs nothing next to the rows).
inline Tensor contiguous_ids(const Tensor& ids) { return as_contiguous(as_long(ids)); }

// The ids of two tables, one as if below the other: as many must be countable, and in the dtype of the ids.
inline void check_ids(const Tensor& ids, int64_t vocabulary, int64_t num_virtual) {
  check_integer(ids, "input_ids");
  if (vocabulary < 0 || num_virtual < 0 || vocabulary > INT64_MAX - num_virtual)
    refuse("vocabulary and num_virtual", "sizes of at least 0",
           std::to_string(vocabulary) + " and " + std::to_string(num_virtual));
  constexpr int64_t kInt32Ids = int64_t{1} << 31;
  if (vocabulary + num_virtual > kInt32Ids && type_of(ids) == aoti_torch_dtype_int32())
    refuse("input_ids", "int64, for int32 does not count to " + std::to_string(vocabulary + num_virtual) + " rows",
           "int32; convert it with .long()");
  check_storage(ids, "input_ids");
}

inline void check_embedding(const Tensor& ids, const Tensor& weight, const Tensor& virtual_rows) {
  const int64_t* table = check_shape(weight, "weight", {{"V"}, {"E"}});
  const int64_t* prompt = check_shape(virtual_rows, "virtual", {{"N"}, {"E"}});
  if (prompt[1] != table[1])
    refuse("virtual", "rows as long as those of weight, " + std::to_string(table[1]), std::to_string(prompt[1]));
  const DType dtype = dtype_of(weight, "weight"), virtual_dtype = dtype_of(virtual_rows, "virtual");
  if (virtual_dtype != dtype && virtual_dtype != DType::f32)
    refuse("virtual", "the dtype of weight, or float32", "another one");
  check_ids(ids, table[0], prompt[0]);
}

inline void check_embedding_backward(const Tensor& grad, const Tensor& ids, int64_t vocabulary, int64_t num_virtual) {
  const auto sizes = grad.sizes(), places = ids.sizes();
  bool fits = sizes.size() == places.size() + 1;
  for (size_t d = 0; fits && d < places.size(); ++d) fits = sizes[d] == places[d];
  if (!fits) refuse("grad", "one row for each of input_ids " + text_of(places), text_of(sizes));
  dtype_of(grad, "grad");
  check_storage(grad, "grad", sizes);
  check_ids(ids, vocabulary, num_virtual);
}

inline EmbeddingForward embedding_problem(const Tensor& ids, const Tensor& weight, const Tensor& virtual_rows,
                                          Tensor& out) {
  EmbeddingForward p;
  p.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  p.count = ids.numel();
  p.vocabulary = weight.size(0);
  p.num_virtual = virtual_rows.size(0);
  p.hidden = weight.size(1);
  p.weight = const_view(weight, "weight");
  p.virtual_rows = const_view(virtual_rows, "virtual");
  p.out = View{out.mutable_data_ptr(), p.weight.dtype, {p.hidden, 0, 0}};
  return p;
}

inline EmbeddingBackward embedding_problem(const Tensor& ids, const Tensor& grad, int64_t vocabulary,
                                           Tensor& grad_virtual) {
  EmbeddingBackward p;
  p.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  p.count = ids.numel();
  p.vocabulary = vocabulary;
  p.num_virtual = grad_virtual.size(0);
  p.hidden = grad_virtual.size(1);
  p.grad_out = ConstView{grad.const_data_ptr(), dtype_of(grad, "grad"), {p.hidden, 0, 0}};
  p.grad_virtual = static_cast<float*>(grad_virtual.mutable_data_ptr());
  return p;
}

inline Tensor empty_embedding(const Tensor& input_ids, const Tensor& weight) {
  std::vector<int64_t> shape(input_ids.sizes().begin(), input_ids.sizes().end());
  shape.push_back(weight.size(1));
  return empty(weight, type_of(weight), shape);
}

}  // namespace prefixcore
