// Threads that meet in memory, with and without what must keep them apart.
#include <memory>

#include "case.h"

namespace {

using std::size_t;

template <class Kernel>
std::unique_ptr<float[]> launch(unsigned blocks, unsigned threads, size_t shared_bytes, size_t size, Kernel kernel) {
  auto out = std::make_unique<float[]>(size);
  cusim::launch("small", dim3(blocks), dim3(threads), shared_bytes, [&, to = out.get()] { kernel(to); });
  return out;
}

// Each thread takes what its neighbour in the warp wrote.
template <bool synchronised>
bool swap_in_warp() {
  const auto out = launch(1, 64, 64 * sizeof(float), 64, [](float* to) {
    const unsigned i = threadIdx.x;
    shared<float>()[i] = static_cast<float>(i);
    if (synchronised) __syncwarp();
    to[i] = shared<float>()[i ^ 1];
  });
  for (int i = 0; i < 64; i++)
    if (out[i] != static_cast<float>(i ^ 1)) return false;
  return true;
}
CASE(syncwarp) { return swap_in_warp<true>(); }
CASE(no_syncwarp) { return swap_in_warp<false>(); }

CASE(syncwarp_of_halves) {  // each half of a warp meets alone, as often as it likes
  const auto out = launch(1, 32, 32 * sizeof(float), 32, [](float* to) {
    const unsigned i = threadIdx.x, mask = i < 16 ? 0x0000ffffu : 0xffff0000u;
    float* mine = shared<float>();
    mine[i] = 0;
    __syncwarp(mask);
    for (unsigned turn = 0; turn < (i < 16 ? 3u : 5u); turn++) {
      const float next = mine[i ^ 1] + 1;
      __syncwarp(mask);
      mine[i] = next;
      __syncwarp(mask);
    }
    __syncwarp();
    to[i] = mine[31 - i];
  });
  for (int i = 0; i < 32; i++)
    if (out[i] != (i < 16 ? 5.f : 3.f)) return false;
  return true;
}

CASE(blocks_write_one_word) {
  const auto out = launch(4, 32, 0, 32, [](float* to) { to[threadIdx.x] = 1.f; });
  return out[0] == 1.f;
}
CASE(blocks_write_their_own) {
  const auto out = launch(4, 32, 0, 128, [](float* to) { to[blockIdx.x * 32 + threadIdx.x] = 1.f; });
  return out[127] == 1.f;
}
CASE(blocks_write_one_word_after_a_barrier) {  // which orders threads of a block alone
  const auto out = launch(4, 32, 0, 32, [](float* to) {
    __syncthreads();
    to[threadIdx.x] = 1.f;
  });
  return out[0] == 1.f;
}

// The last block to come sums what all of them wrote.
template <bool fenced>
bool sum_in_last_block() {
  unsigned arrived = 0;
  const auto out = launch(4, 32, sizeof(unsigned), 5 * 32, [&](float* to) {
    to[blockIdx.x * 32 + threadIdx.x] = static_cast<float>(blockIdx.x);
    if (fenced) __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *shared<unsigned>() = atomicAdd(&arrived, 1u);
    __syncthreads();
    if (*shared<unsigned>() != gridDim.x - 1) return;
    if (fenced) __threadfence();
    __syncthreads();
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; i++) sum += to[i * 32 + threadIdx.x];
    to[gridDim.x * 32 + threadIdx.x] = sum;
  });
  return out[4 * 32] == 6.f;
}
CASE(last_block) { return sum_in_last_block<true>(); }
CASE(last_block_without_fences) { return sum_in_last_block<false>(); }

CASE(atomics) {
  auto out = launch(3, 64, 0, 4, [](float* to) { atomicAdd(&to[threadIdx.x % 4], 1.f); });
  return out[0] == 48.f && out[3] == 48.f;
}

// Warp 0 fills what warps 1 and 2 read, in turns: bar.arrive where it need not wait.
CASE(named_barriers) {
  const auto out = launch(1, 96, 64 * sizeof(float), 64, [](float* to) {
    float sum = 0;
    for (int turn = 0; turn < 4; turn++) {
      if (threadIdx.x < 32) {
        if (turn) cusim::barrier_sync(2, 96);  // they have read
        for (unsigned i = threadIdx.x; i < 64; i += 32) shared<float>()[i] = static_cast<float>(turn);
        cusim::barrier_arrive(1, 96);
      } else {
        cusim::barrier_sync(1, 96);
        sum += shared<float>()[threadIdx.x - 32];
        if (turn < 3) cusim::barrier_arrive(2, 96);
      }
    }
    if (threadIdx.x >= 32) to[threadIdx.x - 32] = sum;
  });
  return out[0] == 6.f && out[63] == 6.f;
}
CASE(named_barrier_missing) {  // the reader does not wait for the writer
  const auto out = launch(1, 64, 32 * sizeof(float), 32, [](float* to) {
    if (threadIdx.x < 32) {
      shared<float>()[threadIdx.x] = 1.f;
      cusim::barrier_sync(1, 32);
    } else {
      cusim::barrier_sync(2, 32);
      to[threadIdx.x - 32] = shared<float>()[threadIdx.x - 32];
    }
  });
  return out[0] == 1.f;
}

}  // namespace
