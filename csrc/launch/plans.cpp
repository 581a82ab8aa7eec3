#include "plans.h"

#include <pthread.h>

#include <algorithm>
#include <list>
#include <mutex>
#include <unordered_map>

namespace prefixcore::launch {
namespace {

constexpr int64_t kLimit = 512;
constexpr size_t kMostTickets = 64;  // more than threads record at once: whoever asked and never came back is forgotten

constexpr int64_t kMostFailures = 3;

struct Kept {
  Signature signature;
  Entry entry;
};

struct Ticket {
  int64_t number = 0;
  Signature signature, any_length;
};

struct HashOf {
  size_t operator()(const Signature& words) const {
    uint64_t hash = 0x9e3779b97f4a7c15U;
    for (const int64_t word : words) {
      hash = (hash ^ static_cast<uint64_t>(word)) * 0xff51afd7ed558ccdU;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

struct Store {
  std::mutex mutex;
  int64_t limit = kLimit, last_entry = 0, last_ticket = 0;
  std::list<Kept> by_use;  // the last used first
  std::unordered_map<Signature, std::list<Kept>::iterator, HashOf> by_signature;
  std::list<Ticket> tickets;

  void trim() {
    while (static_cast<int64_t>(by_use.size()) > limit) {
      by_signature.erase(by_use.back().signature);
      by_use.pop_back();
    }
  }

  void clear() {
    by_signature.clear();
    by_use.clear();
    tickets.clear();
  }
};

Store& store() {
  static Store* const one = [] {
    static auto* made = new Store;  // never destroyed: threads may outlive the end of main
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); },
                   [] {
                     made->clear();
                     made->mutex.unlock();
                   });
    return made;
  }();
  return *one;
}

}  // namespace

Found find(const Signature& signature) {
  Store& s = store();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const auto found = s.by_signature.find(signature);
  if (found == s.by_signature.end()) return {};
  s.by_use.splice(s.by_use.begin(), s.by_use, found->second);
  Entry& entry = found->second->entry;
  ++entry.hits;
  return {true, entry.number, entry.plan};
}

int64_t ask_for(const Signature& signature, const Signature& any_length) {
  Store& s = store();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.tickets.push_back({++s.last_ticket, signature, any_length});
  if (s.tickets.size() > kMostTickets) s.tickets.pop_front();
  return s.last_ticket;
}

int64_t keep(int64_t ticket, std::shared_ptr<const Plan> plan, bool any_length) {
  Store& s = store();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const auto asked = std::find_if(s.tickets.begin(), s.tickets.end(), [&](auto& t) { return t.number == ticket; });
  if (asked == s.tickets.end()) return 0;
  any_length = any_length && !asked->any_length.empty();
  Signature signature = std::move(any_length ? asked->any_length : asked->signature);
  s.tickets.erase(asked);
  const auto before = s.by_signature.find(signature);
  if (before != s.by_signature.end()) {  // another thread has recorded the same
    s.by_use.erase(before->second);
    s.by_signature.erase(before);
  }
  Entry entry;
  entry.number = ++s.last_entry;
  entry.plan = std::move(plan);
  s.by_use.push_front({signature, std::move(entry)});
  s.by_signature.emplace(std::move(signature), s.by_use.begin());
  s.trim();
  return s.last_entry;
}

void failed(int64_t number) {
  Store& s = store();
  const std::lock_guard<std::mutex> lock(s.mutex);
  for (Kept& kept : s.by_use) {
    if (kept.entry.number != number) continue;
    --kept.entry.hits;
    if (++kept.entry.failures == kMostFailures) kept.entry.plan = nullptr;
  }
}

void forget_all() {
  Store& s = store();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.clear();
}

void set_limit(int64_t limit) {
  Store& s = store();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.limit = std::max<int64_t>(limit, 0);
  s.trim();
}

int64_t limit() {
  Store& s = store();
  const std::lock_guard<std::mutex> lock(s.mutex);
  return s.limit;
}

std::vector<Entry> entries() {
  Store& s = store();
  const std::lock_guard<std::mutex> lock(s.mutex);
  std::vector<Entry> out;
  for (const Kept& kept : s.by_use) out.push_back(kept.entry);
  return out;
}

}  // namespace prefixcore::launch
