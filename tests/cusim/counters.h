// What the launches since the last reset did, counted.
#pragma once

#include <cstdint>

#define CUSIM_COUNTERS(_)                                                                      \
  _(launches)                                                                                  \
  _(blocks) _(switches)      /* of threads */                                                  \
      _(barriers)            /* arrivals of a thread, at __syncthreads or a named barrier */   \
      _(warp_operations)     /* arrivals of a thread, at anything that a warp does together */ \
      _(mma) _(ldmatrix)     /* instructions of a warp */                                      \
      _(ldmatrix_wavefronts) /* passes over the banks that they took */                        \
      _(ldmatrix_least)      /* and would have taken without conflicts */                      \
      _(cp_async)            /* instructions of a thread */                                    \
      _(global_bytes_read) _(global_bytes_written)

namespace cusim {

struct Counters {
#define CUSIM_DECLARE(name) uint64_t name = 0;
  CUSIM_COUNTERS(CUSIM_DECLARE)
#undef CUSIM_DECLARE
};
extern Counters counters;

}  // namespace cusim
