// Asking for memory before it is needed.
//
// At short lengths most of what a block reads is read once, from far away. The matrix products leave
// the load ports half idle, so each microkernel call also asks for a few cache lines of what comes
// next: the following tile of keys, the following block of queries, the rows about to be written.
#pragma once

#include "query_block.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

class Ahead {
 public:
  // `rows` rows of `bytes` bytes, `stride` bytes apart. Never faults: an address may be anything.
  void add(const void* first, int64_t stride, int64_t rows, int64_t bytes) {
    if (rows <= 0 || first == nullptr) return;
    if (stride == bytes) {
      bytes *= rows;
      rows = 1;
    }
    if (count_ == kPieces) return;
    piece_[count_++] = {static_cast<const char*>(first), stride, rows, bytes};
  }

  // The rows of `view` that one block of queries reads or writes.
  template <class AnyView>
  void add_block(const AnyView& view, const AttentionProblem& p, const Sequence& s, int64_t kv_head, int64_t first_row,
                 int64_t width) {
    const int64_t group = p.num_heads / p.num_kv_heads;
    const int64_t first = first_row / group, last = min(ceil_div(first_row + kLanes, group), s.query_length);
    for (int64_t g = 0; g < group; ++g) {
      const Row row{s.batch, kv_head * group + g, s.query_start + first};
      add(static_cast<const char*>(view.data) + row_offset(view.stride, row) * size_of(view.dtype),
          view.stride[2] * size_of(view.dtype), last - first, width * size_of(view.dtype));
    }
  }

  // Keys (or values) of one head, tokens [first, last) of the tensor.
  void add_keys(const ConstView& view, int64_t batch, int64_t head, int64_t first, int64_t last, int64_t width) {
    const Row row{batch, head, first};
    add(static_cast<const char*>(view.data) + row_offset(view.stride, row) * size_of(view.dtype),
        view.stride[2] * size_of(view.dtype), last - first, width * size_of(view.dtype));
  }

  template <int lines = 16>
  PREFIXCORE_INLINE void step() {
    if (current_ < count_) ask(lines);
  }

 private:
  static constexpr int kPieces = 24;
  struct Piece {
    const char* row;
    int64_t stride, rows, bytes;
  };

  // The next `lines` cache lines, of as many rows and pieces as that takes.
  __attribute__((noinline)) void ask(int64_t lines) {
    while (lines > 0 && current_ < count_) {
      const Piece& piece = piece_[current_];
      const char* row = piece.row + row_ * piece.stride;
      const int64_t stop = min(byte_ + lines * 64, piece.bytes);
      for (; byte_ < stop; byte_ += 64, --lines) __builtin_prefetch(row + byte_, 0, 2);
      if (byte_ < piece.bytes) return;
      byte_ = 0;
      if (++row_ < piece.rows) continue;
      row_ = 0;
      ++current_;
    }
    if (current_ == count_) current_ = count_ = 0;
  }

  Piece piece_[kPieces];
  int count_ = 0, current_ = 0;
  int64_t row_ = 0, byte_ = 0;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
