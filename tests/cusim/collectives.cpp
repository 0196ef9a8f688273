// Barriers of a block and collectives of a warp, and what CUDA forbids about them.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "counters.h"
#include "sanitizers.h"

namespace cusim {
namespace {

void release_barrier(Barrier& barrier) {
  for (const ThreadState* thread : barrier.waiting) make_ready(*thread);
  barrier.waiting.clear();
  barrier.arrived = 0;
  barrier.warps = 0;
  barrier.phase++;
}

// Returns whether the thread was the last to come.
bool arrive(int id, int threads, bool whole_block, Site site) {
  Barrier& barrier = block.barriers[id];
  const ThreadState& thread = self();
  counters.barriers++;
  if (barrier.arrived && barrier.expected != threads)
    fail("%s:%d: barrier %d of %d threads, where others wait for %d", site.file, site.line, id, threads,
         barrier.expected);
  if (whole_block && barrier.arrived && !(barrier.block_site == site))
    fail("divergent barrier: threads wait at %s:%d and at %s:%d", barrier.block_site.file, barrier.block_site.line,
         site.file, site.line);
  if (whole_block && block.alive < threads)
    fail("%s:%d: __syncthreads, but %d of the block's threads have exited", site.file, site.line,
         threads - block.alive);
  Site& of_warp = barrier.warp_site[thread.warp];
  if (barrier.warps >> thread.warp & 1 && !(of_warp == site))
    fail("divergent barrier: lanes of warp %d wait at %s:%d and at %s:%d", thread.warp, of_warp.file, of_warp.line,
         site.file, site.line);
  of_warp = site;
  barrier.block_site = site;
  barrier.warps |= 1u << thread.warp;
  barrier.expected = threads;
  return ++barrier.arrived == threads;
}

void meet(int id, int threads, bool whole_block, bool stays, Site site) {
  ThreadState& thread = self();
  char* token;
  {
    const sanitizer::Quiet quiet;
    depart(thread);
    Barrier& barrier = block.barriers[id];
    token = &block.tokens->barrier[id][barrier.phase & 1];
    sanitizer::release(token);
    const bool last = arrive(id, threads, whole_block, site);
    if (stays) barrier.waiting.push_back(&thread);
    if (last) release_barrier(barrier);
  }
  if (!stays) return;
  wait(whole_block ? "__syncthreads" : "named barrier", site);
  sanitizer::acquire(token);
}

void check_named(int id, int threads, Site site) {
  if (id < 0 || id > 15) fail("%s:%d: barrier %d: there are 0 to 15", site.file, site.line, id);
  if (threads <= 0 || threads % 32 || threads > static_cast<int>(block.threads.size()))
    fail("%s:%d: barrier %d of %d threads: whole warps of the block's %zu threads can meet", site.file, site.line, id,
         threads, block.threads.size());
}

Collective& find_or_begin(WarpState& warp, uint32_t mask, const char* operation, Site site) {
  const ThreadState& thread = self();
  for (Collective* other : warp.waiting) {
    if (other->mask == mask && other->site == site && strcmp(other->operation, operation) == 0) return *other;
    // Lanes may be at different places, as long as they do not wait for each other.
    if (other->arrived & mask && other->mask >> thread.lane & 1)
      fail("warp %d diverged: lanes %08x wait at %s:%d (%s, mask %08x), and lane %d is at %s:%d (%s, mask %08x)",
           thread.warp, other->arrived, other->site.file, other->site.line, other->operation, other->mask, thread.lane,
           site.file, site.line, operation, mask);
  }
  if (warp.free.empty()) {
    warp.collectives.push_back(std::make_unique<Collective>());
    warp.free.push_back(warp.collectives.back().get());
  }
  Collective& begun = *warp.free.back();
  warp.free.pop_back();
  const int first = __builtin_ctz(mask);
  begun.mask = begun.readers = mask;
  begun.arrived = 0;
  begun.operation = operation;
  begun.site = site;
  begun.token = &block.tokens->warp[thread.warp][first][warp.phase[first]++ & 1];
  warp.waiting.push_back(&begun);
  return begun;
}

Collective& join(uint32_t mask, const char* operation, const void* mine, size_t size, Combine combine, bool orders,
                 Site site) {
  ThreadState& thread = self();
  Collective* joined;
  {
    const sanitizer::Quiet quiet;
    depart(thread);
    counters.warp_operations++;
    WarpState& warp = block.warps[thread.warp];
    if (!(mask >> thread.lane & 1))
      fail("%s:%d: %s: lane %d calls it, but is not in the mask %08x", site.file, site.line, operation, thread.lane,
           mask);
    if (mask & ~warp.alive)
      fail("%s:%d: %s: the mask %08x names lanes that have exited or never were (%08x are left)", site.file, site.line,
           operation, mask, warp.alive);
    joined = &find_or_begin(warp, mask, operation, site);
    if (size > sizeof(Slots::lane[0])) fail("%s:%d: %s of %zu bytes", site.file, site.line, operation, size);
    if (size) memcpy(joined->slots.lane[thread.lane], mine, size);
    thread.last = joined;
    if (orders) sanitizer::release(joined->token);
    joined->arrived |= 1u << thread.lane;
    if (joined->arrived == mask) {
      if (mask == warp.alive) count_accesses_of(thread.warp);
      if (combine) combine(joined->slots);
      warp.waiting.erase(std::find(warp.waiting.begin(), warp.waiting.end(), joined));
      warp.ready |= mask;
    }
  }
  wait(operation, site);
  if (orders) sanitizer::acquire(joined->token);
  return *joined;
}

}  // namespace

void depart(ThreadState& thread) {
  if (!thread.last) return;
  thread.last->readers &= ~(1u << thread.lane);
  if (!thread.last->readers) block.warps[thread.warp].free.push_back(thread.last);
  thread.last = nullptr;
}

void check_barriers_after_exit(const ThreadState& thread) {
  WarpState& warp = block.warps[thread.warp];
  warp.alive &= ~(1u << thread.lane);
  block.alive--;
  for (const Collective* other : warp.waiting)
    if (other->mask >> thread.lane & 1)
      fail("exited, while lanes %08x of its warp wait for it at %s:%d (%s)", other->arrived, other->site.file,
           other->site.line, other->operation);
  const Barrier& whole_block = block.barriers[0];
  if (whole_block.arrived && whole_block.expected == static_cast<int>(block.threads.size()))
    fail("exited, while %d threads wait for it at %s:%d (__syncthreads)", whole_block.arrived,
         whole_block.block_site.file, whole_block.block_site.line);
}

void block_barrier(Site site) { meet(0, static_cast<int>(block.threads.size()), true, true, site); }

void barrier_sync(int id, int threads, Site site) {
  check_named(id, threads, site);
  meet(id, threads, false, true, site);
}

void barrier_arrive(int id, int threads, Site site) {
  check_named(id, threads, site);
  meet(id, threads, false, false, site);
}

void warp_barrier(uint32_t mask, Site site) { join(mask, "__syncwarp", nullptr, 0, nullptr, true, site); }

const Slots& collective(uint32_t mask, const char* operation, const void* mine, size_t size, Combine combine,
                        Site site) {
  return join(mask, operation, mine, size, combine, false, site).slots;
}

}  // namespace cusim
