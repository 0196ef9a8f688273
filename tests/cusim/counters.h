// What the launches since the last reset did, counted.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <tuple>

// Wavefronts are passes over the banks of shared memory; least is how many there would be without conflicts.
// clang-format off
#define CUSIM_COUNTERS(_)                                                                    \
  _(launches) _(blocks)                                                                      \
  _(switches)                 /* of threads */                                               \
  _(barriers)                 /* arrivals of a thread, at __syncthreads or a named one */    \
  _(warp_operations)          /* arrivals of a thread, at what a warp does together */       \
  _(mma) _(ldmatrix)          /* instructions of a warp */                                   \
  _(ldmatrix_wavefronts) _(ldmatrix_least)                                                   \
  _(cp_async)                 /* instructions of a thread */                                 \
  _(cp_async_wavefronts) _(cp_async_least)         /* of their destinations */               \
  _(shared_wavefronts) _(shared_least)             /* of shared_load and shared_store */     \
  _(global_bytes_read) _(global_bytes_written)     /* cp.async, global_load, global_store */ \
  _(global_sectors_read) _(global_sectors_written) /* of 32 bytes, by a warp's instruction */
// clang-format on

namespace cusim {

struct Counters {
#define CUSIM_DECLARE(name) uint64_t name = 0;
  CUSIM_COUNTERS(CUSIM_DECLARE)
#undef CUSIM_DECLARE
};
extern Counters counters;

// How often each (kernel, threads of a block, bytes of shared memory) was launched by its symbol; forgotten at a reset,
// too.
extern std::map<std::tuple<std::string, unsigned, size_t>, uint64_t> launches;

}  // namespace cusim
