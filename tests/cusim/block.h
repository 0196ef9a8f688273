// The state of the block that runs; only the runtime includes it.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "accesses.h"
#include "fiber.h"
#include "memory.h"
#include "runtime.h"

namespace cusim {

struct Collective {
  uint32_t mask = 0, arrived = 0;
  uint32_t readers = 0;  // lanes that may still read the slots
  const char* operation = nullptr;
  Site site{};
  Slots slots;
  char* token = nullptr;  // ThreadSanitizer's, for a warp barrier
};

struct CopyInFlight {
  void* destination;
  int bytes;
  unsigned char data[16];  // as read when the copy was issued, zeros behind
};

struct ThreadState : Thread {
  Fiber fiber;
  bool exited = false;
  const char* waits_for = nullptr;
  Site waits_at{};
  Collective* last = nullptr;  // whose slots it may still read
  std::vector<CopyInFlight> open_copies;
  std::deque<std::vector<CopyInFlight>> copy_groups;
  std::vector<Access> accesses;  // not counted yet
  std::vector<void*> atomics;    // addresses since the block began
  bool fenced = false;
};

struct WarpState {
  uint32_t alive = 0, ready = 0;  // lanes
  uint32_t priority = 0;          // the ready warp with the highest one runs
  std::vector<std::unique_ptr<Collective>> collectives;
  std::vector<Collective*> waiting;  // not complete
  std::vector<Collective*> free;
  uint8_t phase[32] = {};  // of the tokens of the masks that begin with a lane
};

struct Barrier {
  int arrived = 0, expected = 0;  // threads
  unsigned phase = 0;
  Site block_site{}, warp_site[32];
  uint32_t warps = 0;  // that have arrived, in part at least
  std::vector<ThreadState*> waiting;
};

// ThreadSanitizer takes each address as something that threads synchronise on. These are fresh for each block.
struct Tokens {
  char barrier[16][2];
  char warp[32][32][2];  // warp, first lane of the mask, phase
};

struct Block {
  std::vector<ThreadState> threads;
  std::vector<WarpState> warps;
  Barrier barriers[16];
  int alive = 0;
  char* shared = nullptr;
  size_t shared_size = 0;
  Tokens* tokens = nullptr;
};
extern Block block;

inline ThreadState& self() { return static_cast<ThreadState&>(*current); }
// Lets other threads run until this one is made ready.
void wait(const char* for_what, Site at);
void make_ready(const ThreadState& thread);
// The lane has read what it was to read of its last collective.
void depart(ThreadState& thread);
// A thread that has exited arrives at no barrier, and no barrier may wait for it.
void check_barriers_after_exit(const ThreadState& thread);

// Counts what the lanes of a warp accessed since they were last together, which they must be now.
void count_accesses_of(int warp);

void allocate_shared_memory(size_t size);
void check_shared_memory_margins();
void release_shared_memory();

}  // namespace cusim
