// Soft embedding's tensors as the problems that kernels take, whatever the device.
#pragma once

#include "embedding.h"
#include "tensors.h"

namespace prefixcore {

// The ids as contiguous int64 (they are small: converting them costs nothing next to the rows).
inline Tensor contiguous_ids(const Tensor& ids) { return as_contiguous(as_type(ids, ScalarType::Long)); }

inline EmbeddingForward embedding_problem(const Tensor& ids, const Tensor& weight, const Tensor& virtual_rows,
                                          Tensor& out) {
  EmbeddingForward p;
  p.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  p.count = ids.numel();
  p.vocabulary = weight.size(0);
  p.num_virtual = virtual_rows.size(0);
  p.hidden = weight.size(1);
  if (virtual_rows.size(1) != p.hidden)
    throw std::invalid_argument("virtual: expected rows as long as those of weight");
  p.weight = const_view(weight, "weight");
  p.virtual_rows = const_view(virtual_rows, "virtual");
  p.out = View{out.mutable_data_ptr(), p.weight.dtype, {p.hidden, 0, 0}};
  if (p.virtual_rows.dtype != p.out.dtype && p.virtual_rows.dtype != DType::f32)
    throw std::invalid_argument("virtual: expected the dtype of weight, or float32");
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
  if (grad.numel() != p.count * p.hidden) throw std::invalid_argument("grad: expected one row for each of input_ids");
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
