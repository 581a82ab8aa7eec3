// Columns of keys or values (float32.h), made once for all blocks of queries that a worker takes one after the other.
//
// Where an element is a pair, columns are a copy: two rows interleaved. Each block of queries would make them anew of
// every tile it sees, and with several query heads to a key/value head there are many blocks.
#pragma once

#include "key_tile.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

template <class Arithmetic>
class KeptColumns {
 public:
  using Element = typename Arithmetic::Element;

  // `keys`: how many there can be; 0: each tile takes the place of the one before.
  KeptColumns(int64_t keys, int64_t width, Carver& carve)
      : width_(width), apart_(keys > 0), room_(carve.take<Element>(elements(max<int64_t>(keys, kKeys)))) {}

  // From now on those of other keys, of which the first `made` are here: somebody left them in the same memory.
  void begin(int64_t made) { made_ = apart_ ? made : 0; }

  // The columns of `keys` keys from number `first` on. Calls rows() for what they are made of. The numbers of keys
  // count from 0 on without a gap, and tiles begin at multiples of kKeys.
  template <class Rows>
  TileRows<Element> of(int64_t first, int keys, Rows rows) {
    if (!apart_) return Arithmetic::columns(room_, width_, rows(), keys);
    const TileRows<Element> here{room_ + elements(first), width_};
    if (first + keys <= made_) return here;
    made_ = first + keys;
    return Arithmetic::columns(room_ + elements(first), width_, rows(), keys);
  }

 private:
  int64_t elements(int64_t keys) const {
    return Arithmetic::kPack > 1 ? round_up(keys, key_step<Arithmetic>) / Arithmetic::kPack * width_ : 0;
  }

  int64_t width_, made_ = 0;
  bool apart_;
  Element* room_;
};

// How many keys' columns are worth keeping: none where they are the rows themselves, or where a window's edge lets
// every block begin elsewhere.
template <class Arithmetic>
static int64_t keys_to_keep(const AttentionProblem& p, int64_t keys) {
  return Arithmetic::kPack > 1 && p.sliding_window <= 0 ? keys : 0;
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA
