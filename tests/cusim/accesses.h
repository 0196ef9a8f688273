// What a warp's loads and stores cost: bank conflicts in shared memory, 32-byte sectors of global memory.
//
// Lanes go their own ways here, so each notes its accesses. What the lanes of a warp did at the same place of the
// source, each for the same time since the warp was last together, counts as one instruction.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime.h"

namespace cusim {

enum class Space : uint8_t { shared, copy, global_read, global_write };  // copy: the destination of a cp.async

struct Access {
  Site site;
  uintptr_t address;
  uint8_t bytes;
  Space space;
};

// Counts what the lanes of a warp have noted, and forgets it.
void count_accesses(std::vector<Access>* const (&lanes)[32]);

}  // namespace cusim
