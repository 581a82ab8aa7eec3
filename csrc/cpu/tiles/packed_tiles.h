// Packed tiles: keys or values in the form that products want (arithmetic.h), packed once for all blocks of queries
// that a worker takes one after the other.
//
// Some forms need a copy: another dtype, pairs of interleaved rows, keys without their padding. Without packed tiles
// each block of queries would make that copy again of every tile it sees, and with several query heads to a key/value
// head there are many blocks. Rows that lie far apart are packed, too: a power of two apart, they share few cache sets.
#pragma once

#include "arena.h"
#include "head_keys.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// So many rows a power of two apart still fit into a core's own cache.
constexpr int64_t kScatteredRows = 256;

template <class Element>
class PackedTiles {
 public:
  // Room for `capacity` keys; 0: nothing stays packed, each tile takes the place of the one before. A matrix row has
  // room for `width` elements, of which an unpacked one has `used`, and holds `pack` keys.
  PackedTiles(int64_t capacity, int64_t width, int64_t used, int64_t pack, Arena& arena)
      : capacity_(capacity),
        width_(width),
        used_(used),
        pack_(pack),
        packed_(arena.allocate<int64_t>(1)),
        data_(arena.allocate<Element>(ceil_div(round_up(max<int64_t>(capacity, kBlockN), kBlockN), pack) * width)) {}

  // Before the first tile of a block of queries. `same_keys`: the worker's previous block read the same keys, so what
  // it packed stays. The count of packed keys is in the arena because that memory outlives this object.
  void begin(bool same_keys) {
    if (!same_keys) *packed_ = 0;
  }

  // The tile of `keys` keys from number `first` on; make(buffer) packs it into `buffer` or returns where it lies.
  // Tiles come one after the other, the first at 0, and begin at multiples of kBlockN. A tile may go on with keys that
  // another block saw. Their probabilities are 0 here, so they change nothing, unless a value is infinite or NaN.
  template <class Make>
  MatrixView<Element> get(int64_t first, int keys, Make make) {
    if (capacity_ == 0) return make(data_);
    const MatrixView<Element> packed{data_ + first / pack_ * width_, width_};
    if (first + keys <= *packed_) return packed;
    const MatrixView<Element> tile = make(data_ + first / pack_ * width_);
    if (tile.data != packed.data) {
      if (tile.stride == width_ || capacity_ <= kScatteredRows) return tile;
      for (int64_t i = 0; i < ceil_div(keys, pack_); ++i)
        __builtin_memcpy(data_ + (first / pack_ + i) * width_, tile.data + i * tile.stride,
                         static_cast<size_t>(used_) * sizeof(Element));
    }
    *packed_ = first + keys;
    return packed;
  }

  // Prefetches that tile if it is packed, else calls prefetch_source().
  template <class Source>
  void prefetch(Prefetcher& prefetcher, int64_t first, int64_t keys, Source prefetch_source) const {
    if (capacity_ == 0 || first + keys > *packed_) return prefetch_source();
    const int64_t bytes = width_ * static_cast<int64_t>(sizeof(Element));
    prefetcher.add(data_ + first / pack_ * width_, bytes, ceil_div(keys, pack_), bytes);
  }

 private:
  int64_t capacity_, width_, used_, pack_;
  int64_t* packed_;
  Element* data_;
};

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
