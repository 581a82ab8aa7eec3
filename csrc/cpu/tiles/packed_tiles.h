// Tiles of keys or values in the form that products want (float32.h), made once for all blocks of queries that a worker
// takes one after the other.
//
// Some forms are a copy: pairs of interleaved rows, another type, keys without their padding. Each block of queries
// would make them anew of every tile it sees, and with several query heads to a key/value head there are many blocks.
// And many rows that lie apart share few places of a cache: they are put side by side, too.
#pragma once

#include "../attention/tile_plan.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

// So many rows a power of two apart still fit into a core's own cache.
constexpr int64_t kScatteredRows = 256;
// So many numbers stay there beside everything else.
constexpr int64_t kNear = 128 * 1024;

template <class Element>
class KeptTiles {
 public:
  // Of `keys` keys at most; 0: nothing is kept, each tile takes the place of the one before. A row has room for `width`
  // elements, of which `used` are there before it is made, and holds `pack` keys.
  KeptTiles(int64_t keys, int64_t width, int64_t used, int64_t pack, Carver& carve)
      : capacity_(keys),
        width_(width),
        used_(used),
        pack_(pack),
        made_(carve.take<int64_t>(1)),
        room_(carve.take<Element>(ceil_div(round_up(max<int64_t>(keys, kKeys), kKeys), pack) * width)) {}

  // From now on tiles of the `same` keys as before, which may have been in the unit of work before: its memory is ours.
  void begin(bool same) {
    if (!same) *made_ = 0;
  }

  // The tile of `keys` keys from number `first` on; it may go on with keys that another block saw, whose probabilities
  // are 0 in this one (so an infinite value there is a NaN here, which the block alone would not see). Tiles come one
  // after the other, the first at 0, and begin at multiples of kKeys. make(room) returns one, there or elsewhere.
  template <class Make>
  TileRows<Element> of(int64_t first, int keys, Make make) {
    if (capacity_ == 0) return make(room_);
    const TileRows<Element> here{room_ + first / pack_ * width_, width_};
    if (first + keys <= *made_) return here;
    const TileRows<Element> tile = make(room_ + first / pack_ * width_);
    if (tile.data != here.data) {
      if (tile.stride == width_ || capacity_ <= kScatteredRows) return tile;
      for (int64_t i = 0; i < ceil_div(keys, pack_); ++i)
        __builtin_memcpy(room_ + (first / pack_ + i) * width_, tile.data + i * tile.stride,
                         static_cast<size_t>(used_) * sizeof(Element));
    }
    *made_ = first + keys;
    return here;
  }

  // Asks for the same before it is wanted. Calls source() if it is still to be made.
  template <class Source>
  void ask(Ahead& ahead, int64_t first, int64_t keys, Source source) const {
    if (capacity_ == 0 || first + keys > *made_) return source();
    const int64_t bytes = width_ * static_cast<int64_t>(sizeof(Element));
    ahead.add(room_ + first / pack_ * width_, bytes, ceil_div(keys, pack_), bytes);
  }

 private:
  int64_t capacity_, width_, used_, pack_;
  int64_t* made_;
  Element* room_;
};

// Asks for the keys and values of the tile of a sequence that starts at `slot`, number `first` of the kept ones.
template <class Element>
static void ask_for_tile(Ahead& ahead, const KeptTiles<Element>& key_tiles, const KeptTiles<Element>& value_tiles,
                         const AttentionProblem& p, const Sequence& s, const KeyList& list, int64_t kv_head,
                         int64_t slot, int64_t end, int64_t first) {
  if (slot >= end) return;
  const int64_t keys = min<int64_t>(kKeys, end - slot);
  key_tiles.ask(ahead, first, keys, [&] { ask_for_rows(ahead, p.key, p.head_dim, s, list, kv_head, slot, end); });
  value_tiles.ask(ahead, first, keys, [&] { ask_for_rows(ahead, p.value, p.value_dim, s, list, kv_head, slot, end); });
}

// How many keys are worth keeping of `keys`: none where a window's edge lets every block begin elsewhere.
static int64_t keys_to_keep(const AttentionProblem& p, int64_t keys) { return p.sliding_window > 0 ? 0 : keys; }

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
