// Soft embedding: a gather from two tables that reads and writes each byte once, and its backward, which sums
// the gradient of each virtual row in the order of the ids.
#include "embedding.h"

#include <cstring>
#include <vector>

#include "convert.h"

namespace prefixcore::cpu {

using namespace PREFIXCORE_ISA;  // the row conversions of the instruction set this file is compiled for

namespace {

int64_t padded(int64_t hidden) { return (hidden + kWidth - 1) / kWidth * kWidth; }

const char* row_of(const ConstView& table, int64_t row) {
  return static_cast<const char*>(table.data) + row * table.stride[0] * size_of(table.dtype);
}

void read_row(float* to, const ConstView& table, int64_t row, int64_t hidden) {
  const char* from = row_of(table, row);
  switch (table.dtype) {
    case DType::f32: return load_row<DType::f32>(to, from, hidden, padded(hidden));
    case DType::bf16: return load_row<DType::bf16>(to, from, hidden, padded(hidden));
    case DType::f16: return load_row<DType::f16>(to, from, hidden, padded(hidden));
  }
}

}  // namespace

void embedding_forward(const EmbeddingForward& p, const Parallel& parallel) {
  const int64_t row_bytes = p.hidden * size_of(p.out.dtype);
  auto gather = [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(p.virtual_rows.dtype == p.out.dtype ? 0 : padded(p.hidden));
    for (int64_t i = begin; i < end; ++i) {
      char* out = static_cast<char*>(p.out.data) + i * row_bytes;
      const int64_t id = p.ids[i];
      if (id < p.vocabulary) {
        std::memcpy(out, row_of(p.weight, id), row_bytes);
      } else if (buffer.empty()) {
        std::memcpy(out, row_of(p.virtual_rows, id - p.vocabulary), row_bytes);
      } else {  // virtual rows kept in another precision than the table
        read_row(buffer.data(), p.virtual_rows, id - p.vocabulary, p.hidden);
        store_row(out, p.out.dtype, buffer.data(), p.hidden, 1.0f);
      }
    }
  };
  if (row_bytes > 0) parallel(p.count, gather);
}

void embedding_backward(const EmbeddingBackward& p, const Parallel& parallel) {
  // The places of each virtual row, in order: a counting sort, so that one task sums one row alone.
  std::vector<int64_t> start(p.num_virtual + 1, 0);
  for (int64_t i = 0; i < p.count; ++i)
    if (p.ids[i] >= p.vocabulary) ++start[p.ids[i] - p.vocabulary + 1];
  for (int64_t n = 0; n < p.num_virtual; ++n) start[n + 1] += start[n];
  std::vector<int64_t> places(start.back()), next(start.begin(), start.end() - 1);
  for (int64_t i = 0; i < p.count; ++i)
    if (p.ids[i] >= p.vocabulary) places[next[p.ids[i] - p.vocabulary]++] = i;

  auto reduce = [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(padded(p.hidden));
    for (int64_t n = begin; n < end; ++n) {
      float* sum = p.grad_virtual + n * p.hidden;
      std::memset(sum, 0, p.hidden * sizeof(float));
      for (int64_t at = start[n]; at < start[n + 1]; ++at) {
        read_row(buffer.data(), p.grad_out, places[at], p.hidden);
        for (int64_t e = 0; e < p.hidden; ++e) sum[e] += buffer[e];
      }
    }
  };
  if (p.hidden > 0) parallel(p.num_virtual, reduce);
}

int64_t first_bad_id(const int64_t* ids, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= limit) return i;
  return -1;
}

}  // namespace prefixcore::cpu
