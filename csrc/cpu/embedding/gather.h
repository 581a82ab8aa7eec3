// Soft embedding: a gather that looks at each id once and reads and writes each byte once, and its backward, which
// reads no gradient but that of virtual rows.
#pragma once

#include "../simd/convert.h"
#include "embedding.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// The rows of two tables, one as if below the other.
struct TwoTables {
  const char *weight, *virtual_rows;
  int64_t weight_stride, virtual_stride;  // bytes
  int64_t vocabulary;
  uint64_t count;

  explicit TwoTables(const EmbeddingForward& p)
      : weight(static_cast<const char*>(p.weight.data)),
        virtual_rows(static_cast<const char*>(p.virtual_rows.data)),
        weight_stride(p.weight.stride[0] * size_of(p.weight.dtype)),
        virtual_stride(p.virtual_rows.stride[0] * size_of(p.virtual_rows.dtype)),
        vocabulary(p.vocabulary),
        count(static_cast<uint64_t>(p.vocabulary + p.num_virtual)) {}

  bool has(int64_t id) const { return static_cast<uint64_t>(id) < count; }  // one below 0 becomes too large
  const char* row(int64_t id) const {
    return id < vocabulary ? weight + id * weight_stride : virtual_rows + (id - vocabulary) * virtual_stride;
  }
};

// Hardware prefetchers follow a row once it is being read, but cannot expect where it begins. So the first bytes of a
// row are prefetched while the rows before it are copied.
constexpr int64_t kPrefetchedRows = 2, kPrefetchedBytes = 512;

static void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < min(bytes, kPrefetchedBytes); at += 64) __builtin_prefetch(row + at);
}

static void copy_row(char* to, const char* from, int64_t bytes) {
  // Where a vector is a cache line, whole lines: a tenth quicker than memcpy for rows of one or two kilobytes.
  constexpr int64_t kLine = 64;
  if (sizeof(Vec) != kLine || bytes % kLine != 0 || reinterpret_cast<uintptr_t>(to) % kLine != 0) {
    __builtin_memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  for (int64_t at = 0; at < bytes; at += kLine)
    store(reinterpret_cast<float*>(to + at), load(reinterpret_cast<const float*>(from + at)));
}

// A virtual row that is float32 beside a table of bfloat16 or float16.
static void round_row(char* to, DType dtype, const char* from, int64_t count) {
  constexpr int64_t kPiece = 256;
  alignas(64) float piece[kPiece];  // store_row reads whole registers, also past the end of a row
  for (int64_t at = 0; at < count; at += kPiece) {
    const int64_t length = min(kPiece, count - at);
    __builtin_memcpy(piece, from + at * size_of(DType::f32), static_cast<size_t>(length * size_of(DType::f32)));
    store_row(to + at * size_of(dtype), dtype, piece, length, 1.0f);
  }
}

static bool gather(const EmbeddingForward& p, const Parallel& parallel) {
  const TwoTables tables(p);
  const int64_t row_bytes = p.hidden * size_of(p.out.dtype);
  const bool rounds = p.virtual_rows.dtype != p.out.dtype;
  bool in_range = true;
  auto gather_range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = p.ids[i], later = p.ids[min(i + kPrefetchedRows, end - 1)];
      if (!tables.has(id)) return __atomic_store_n(&in_range, false, __ATOMIC_RELAXED);
      if (tables.has(later)) prefetch_row(tables.row(later), row_bytes);
      char* out = static_cast<char*>(p.out.data) + i * row_bytes;
      if (rounds && id >= p.vocabulary)
        round_row(out, p.out.dtype, tables.row(id), p.hidden);
      else
        copy_row(out, tables.row(id), row_bytes);
    }
  };
  parallel(p.count, gather_range);
  return in_range;
}

// sum += row
template <DType dtype>
static void add_row(float* sum, const char* row, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(sum + i, load(sum + i) + load_as<dtype>(row, i));
  if (i < count) {
    float rest[kLanes];
    load_row<dtype>(rest, row + i * size_of(dtype), count - i, kLanes);
    for (int64_t lane = 0; i < count; ++i, ++lane) sum[i] += rest[lane];
  }
}

template <DType dtype>
static void sum_gradients(const EmbeddingBackward& p, const int64_t* start, const int64_t* places, int64_t begin,
                          int64_t end) {
  const int64_t row_bytes = p.grad_out.stride[0] * size_of(dtype);
  const auto row = [&](int64_t at) { return static_cast<const char*>(p.grad_out.data) + places[at] * row_bytes; };
  for (int64_t n = begin; n < end; ++n) {
    float* sum = p.grad_virtual + n * p.hidden;
    __builtin_memset(sum, 0, static_cast<size_t>(p.hidden) * sizeof(float));
    for (int64_t at = start[n]; at < start[n + 1]; ++at) {
      prefetch_row(row(min(at + kPrefetchedRows, start[end] - 1)), row_bytes);
      add_row<dtype>(sum, row(at), p.hidden);
    }
  }
}

static void sum_virtual_gradients(const EmbeddingBackward& p, const int64_t* start, const int64_t* places,
                                  const Parallel& parallel) {
  auto reduce = [&](int64_t begin, int64_t end) {
    switch (p.grad_out.dtype) {
      case DType::f32: return sum_gradients<DType::f32>(p, start, places, begin, end);
      case DType::bf16: return sum_gradients<DType::bf16>(p, start, places, begin, end);
      case DType::f16: return sum_gradients<DType::f16>(p, start, places, begin, end);
    }
  };
  parallel(p.num_virtual, reduce);
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
