// The plans that are kept, by signature: a bounded number, the one that was used longest ago goes first. For any number
// of threads; the child of a fork begins with none, for the handles in them are its parent's.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "plan.h"

namespace prefixcore::launch {

// All that a plan depends on: what op, what its tensors look like, its options, and the state that Python names.
using Signature = std::vector<int64_t>;

// What is known of a signature. A refused one has no plan: its calls go by Python.
struct Entry {
  int64_t number = 0;  // of this entry, never used twice
  int64_t hits = 0, failures = 0;
  std::shared_ptr<const Plan> plan;
};

struct Found {
  bool known = false;
  int64_t number = 0;
  std::shared_ptr<const Plan> plan;
};

Found find(const Signature& signature);

// A ticket for whoever records the plan of a call: its signature, and the one that it shares with calls of other
// lengths; empty if it has none.
int64_t ask_for(const Signature& signature, const Signature& any_length);

// Keeps `plan` (nullptr: that there is none) for the signature of a ticket, or if it is one for any length, for that.
// Returns the number of the entry, 0 if nobody asked with this ticket.
int64_t keep(int64_t ticket, std::shared_ptr<const Plan> plan, bool any_length);

// Tells that a replay of an entry has failed, as for want of memory. An entry that fails again and again loses its
// plan.
void failed(int64_t number);

void forget_all();
void set_limit(int64_t limit);
int64_t limit();
std::vector<Entry> entries();

}  // namespace prefixcore::launch
