#include "scratch.h"

#include <c10/core/impl/alloc_cpu.h>

#include <atomic>
#include <utility>

namespace flamingo {
namespace {

constexpr int64_t kLeastKept = 128 << 10, kMostKept = 128 << 20, kHeader = 64;
constexpr int64_t kMostTooLarge = 8;  // how many times as large as what was asked for

struct Block {
  int64_t bytes;  // behind the header

  void* memory() { return reinterpret_cast<char*>(this) + kHeader; }
  static Block* of(void* memory) { return reinterpret_cast<Block*>(static_cast<char*>(memory) - kHeader); }
};

// Whoever exchanges a block out of its place owns it; no lock, which a fork could leave locked in the child.
std::atomic<Block*> kept[16];
std::atomic<int64_t> kept_bytes{0};

Block* take_from(std::atomic<Block*>& place) {
  Block* block = place.load(std::memory_order_relaxed) ? place.exchange(nullptr) : nullptr;
  if (block) kept_bytes -= block->bytes;
  return block;
}

bool keep(Block* block) {
  if ((kept_bytes += block->bytes) <= kMostKept) {
    for (auto& place : kept) {
      Block* nothing = nullptr;
      if (place.compare_exchange_strong(nothing, block)) return true;
    }
  }
  kept_bytes -= block->bytes;
  return false;
}

}  // namespace

void* take_scratch(int64_t bytes) {
  Block* best = nullptr;  // the smallest that is large enough
  for (auto& place : kept) {
    Block* block = bytes < kLeastKept ? nullptr : take_from(place);
    if (!block) continue;
    if (bytes <= block->bytes && block->bytes / kMostTooLarge <= bytes && (!best || block->bytes < best->bytes)) {
      std::swap(best, block);
    }
    if (block && !keep(block)) c10::free_cpu(block);
  }
  if (!best) {
    best = static_cast<Block*>(c10::alloc_cpu(kHeader + bytes));
    best->bytes = bytes;
  }
  return best->memory();
}

void give_scratch(void* scratch) {
  Block* block = Block::of(scratch);
#if !defined(__SANITIZE_ADDRESS__)  // which is to see what is used after it was given back
  if (kLeastKept <= block->bytes && block->bytes <= kMostKept) {
    if (keep(block)) return;
    for (auto& place : kept) {  // room is taken up by sizes that are no longer asked for
      if (Block* other = take_from(place)) c10::free_cpu(other);
      if (keep(block)) return;
    }
  }
#endif
  c10::free_cpu(block);
}

}  // namespace flamingo
