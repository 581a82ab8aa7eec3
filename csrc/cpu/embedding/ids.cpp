// The parts of soft embedding that look at the ids alone, the same for every instruction set.
#include <algorithm>

#include "embedding.h"

namespace prefixcore::cpu {

bool VirtualPlaces::find(const EmbeddingBackward& p) {
  const uint64_t vocabulary = static_cast<uint64_t>(p.vocabulary), rows = static_cast<uint64_t>(p.num_virtual);
  std::vector<int64_t> unsorted;
  // Almost all ids are text: blocks without any other are passed over. The top bit of `other` tells: it is set in an
  // id below 0 and, after the subtraction, clear in one of at least `vocabulary`.
  constexpr int64_t kBlock = 32;
  for (int64_t begin = 0; begin < p.count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, p.count);
    uint64_t other = 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t id = static_cast<uint64_t>(p.ids[i]);
      other |= id | ~(id - vocabulary);
    }
    if (other >> 63 == 0) continue;
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t id = static_cast<uint64_t>(p.ids[i]);
      if (id < vocabulary) continue;
      if (id - vocabulary >= rows) return false;
      unsorted.push_back(i);
    }
  }

  // A counting sort, which keeps the order of the places of one row.
  start.assign(rows + 1, 0);
  for (const int64_t place : unsorted) ++start[p.ids[place] - p.vocabulary + 1];
  for (uint64_t n = 0; n < rows; ++n) start[n + 1] += start[n];
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  places.resize(unsorted.size());
  for (const int64_t place : unsorted) places[next[p.ids[place] - p.vocabulary]++] = place;
  return true;
}

int64_t first_bad_id(const int64_t* ids, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= limit) return i;
  return -1;
}

}  // namespace prefixcore::cpu
