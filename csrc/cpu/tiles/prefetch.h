// Prefetching what comes next, a cache line at a step of the matrix products.
//
// At short lengths most of what a block of queries reads is read once, and comes from memory. The matrix products leave
// the load ports half idle, so every step or two of the microkernel also prefetches one cache line: of the following
// tile of keys, of the following block of queries, of the outputs and gradients about to be written.
#pragma once

#include "../simd/vector.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// Cache lines `stride` bytes apart, one prefetched a call.
struct PrefetchLines {
  const char* next;
  int64_t stride;

  PREFIXCORE_INLINE void prefetch() {
    __builtin_prefetch(next, 0, 2);
    next += stride;
  }
};

// A queue of memory to prefetch.
class Prefetcher {
 public:
  // `rows` rows of `bytes` bytes, `stride` bytes apart. A prefetch never faults, so any address will do. A full queue
  // drops what is added.
  void add(const void* first, int64_t stride, int64_t rows, int64_t bytes) {
    if (rows <= 0 || first == nullptr || count_ == kPieces) return;
    if (stride == bytes)
      piece_[count_++] = {static_cast<const char*>(first), kLine, ceil_div(rows * bytes, kLine), 1};
    else
      piece_[count_++] = {static_cast<const char*>(first), stride, rows, ceil_div(bytes, kLine)};
  }

  // The next `count` lines. They come from one piece, so that the microkernel finds each by one addition: where the
  // piece has fewer left, they begin with lines that were prefetched before (or run past its end, if it never had as
  // many). When nothing is left they are one line, again and again, that is in the first cache anyway.
  PREFIXCORE_INLINE PrefetchLines next_lines(int64_t count) {
    if (current_ == count_) return {reinterpret_cast<const char*>(&current_), 0};
    const Piece& piece = piece_[current_];
    const int64_t row = max<int64_t>(min(row_, piece.rows - count), 0);
    const PrefetchLines lines{piece.first + row * piece.stride + column_ * kLine, piece.stride};
    row_ += count;
    if (row_ >= piece.rows) next_column();
    return lines;
  }

  // Prefetches the next `count` lines at once.
  void prefetch(int64_t count) {
    if (current_ == count_) return;
    PrefetchLines lines = next_lines(count);
    for (int64_t i = 0; i < count; ++i) lines.prefetch();
  }

 private:
  static constexpr int kPieces = 24;
  static constexpr int64_t kLine = 64;

  // Prefetched column by column: then the next line is always `stride` bytes on.
  struct Piece {
    const char* first;
    int64_t stride, rows, columns;  // columns of cache lines
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
