// Asking for memory before it is needed.
//
// At short lengths most of what a block reads is read once, from far away. The matrix products leave the load ports
// half idle, so each step or two of the microkernel also ask for a cache line of what comes next: the following tile of
// keys, the following block of queries, the rows of outputs and gradients about to be written.
#pragma once

#include "query_block.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// Cache lines, `stride` bytes apart.
struct Lines {
  const char* next;
  int64_t stride;

  PREFIXCORE_INLINE void ask() {
    __builtin_prefetch(next, 0, 2);
    next += stride;
  }
};

class Ahead {
 public:
  // `rows` rows of `bytes` bytes, `stride` bytes apart. Never faults: an address may be anything.
  void add(const void* first, int64_t stride, int64_t rows, int64_t bytes) {
    if (rows <= 0 || first == nullptr || count_ == kPieces) return;
    if (stride == bytes)
      piece_[count_++] = {static_cast<const char*>(first), kLine, ceil_div(rows * bytes, kLine), 1};
    else
      piece_[count_++] = {static_cast<const char*>(first), stride, rows, ceil_div(bytes, kLine)};
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

  // The next `count` lines to ask for. Where a piece has fewer left they begin with some that were asked for before (or
  // run past its end, if it never had as many), and when no piece is left they are one line that is near.
  PREFIXCORE_INLINE Lines take(int64_t count) {
    if (current_ == count_) return {reinterpret_cast<const char*>(&current_), 0};
    const Piece& piece = piece_[current_];
    const int64_t row = max<int64_t>(min(row_, piece.rows - count), 0);
    const Lines lines{piece.first + row * piece.stride + column_ * kLine, piece.stride};
    row_ += count;
    if (row_ >= piece.rows) next_column();
    return lines;
  }

  // Asks for the next `count` lines at once.
  void step(int64_t count) {
    if (current_ == count_) return;
    Lines lines = take(count);
    for (int64_t i = 0; i < count; ++i) lines.ask();
  }

 private:
  static constexpr int kPieces = 24;
  static constexpr int64_t kLine = 64;
  // Asked for a column of lines at a time: then the next one is an addition away.
  struct Piece {
    const char* first;
    int64_t stride, rows, columns;
  };

  void next_column() {
    row_ = 0;
    if (++column_ < piece_[current_].columns) return;
    column_ = 0;
    if (++current_ == count_) current_ = count_ = 0;
  }

  Piece piece_[kPieces];
  int count_ = 0, current_ = 0;
  int64_t row_ = 0, column_ = 0;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
