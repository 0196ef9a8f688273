// What CUDA leaves undefined and the emulator refuses.
#include <memory>

#include "case.h"

namespace {

bool launch(unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  cusim::launch("forbidden", dim3(1), dim3(threads), shared_bytes, kernel);
  return true;
}

CASE(divergent_barrier) {
  return launch(64, 0, [] {
    if (threadIdx.x < 40)
      __syncthreads();
    else
      __syncthreads();
  });
}
CASE(barrier_of_some) {
  return launch(64, 0, [] {
    if (threadIdx.x < 40) __syncthreads();
  });
}
CASE(barrier_and_shuffle) {
  return launch(64, 0, [] {
    if (threadIdx.x % 2)
      __syncthreads();
    else
      __shfl_sync(0xffffffffu, 1, 0);
  });
}
CASE(barriers_of_different_size) {
  return launch(64, 0, [] { cusim::barrier_sync(1, threadIdx.x < 32 ? 32 : 64); });
}
CASE(barrier_of_half_a_warp) {
  return launch(64, 0, [] { cusim::barrier_sync(1, 48); });
}
CASE(barrier_that_is_not) {
  return launch(64, 0, [] { cusim::barrier_sync(16, 64); });
}

CASE(divergent_shuffle) {
  return launch(32, 0, [] {
    if (threadIdx.x < 7)
      __shfl_xor_sync(0xffffffffu, 1, 1);
    else
      __shfl_xor_sync(0xffffffffu, 1, 2);
  });
}
CASE(shuffle_with_exited_lanes) {
  return launch(32, 0, [] {
    if (threadIdx.x < 7) __shfl_xor_sync(0xffffffffu, 1, 1);
  });
}
CASE(shuffle_from_outside_of_the_mask) {
  return launch(32, 0, [] {
    if (threadIdx.x < 16) __shfl_sync(0x0000ffffu, 1, 16);
  });
}
CASE(shuffle_by_a_lane_outside_of_the_mask) {
  return launch(32, 0, [] { __shfl_sync(0x0000ffffu, 1, 0); });
}
CASE(ldmatrix_in_half_a_warp) {
  return launch(32, 1024, [] {
    uint32_t x[4];
    if (threadIdx.x < 16) cusim::ldmatrix_x4(x, cusim::shared_address(shared<char>()));
  });
}

CASE(misaligned_ldmatrix) {
  return launch(32, 1024, [] {
    uint32_t x[4];
    cusim::ldmatrix_x4(x, cusim::shared_address(shared<char>()) + threadIdx.x * 16 + 8);
  });
}
CASE(ldmatrix_past_the_end) {
  return launch(32, 31 * 16, [] {
    uint32_t x[4];
    cusim::ldmatrix_x4(x, cusim::shared_address(shared<char>()) + threadIdx.x * 16);
  });
}
CASE(cp_async_past_the_end) {
  alignas(16) static char from[512];
  return launch(32, 31 * 16,
                [] { cusim::cp_async(cusim::shared_address(shared<char>()) + threadIdx.x * 16, from, 16, 16); });
}
CASE(misaligned_cp_async) {
  alignas(16) static char from[512];
  return launch(32, 512, [] { cusim::cp_async(cusim::shared_address(shared<char>()), from + 8, 16, 16); });
}
CASE(shared_address_of_something_else) {
  static int elsewhere;
  return launch(32, 512, [] { cusim::shared_address(&elsewhere); });
}
CASE(misaligned_load) {
  alignas(16) static char from[512];
  return launch(32, 0, [] { cusim::global_load(from + 8, 16); });
}
CASE(misaligned_store) {
  alignas(16) static char to[512];
  return launch(32, 0, [] { cusim::global_store(to + 4, 8); });
}
CASE(store_behind_shared_memory) {  // through an ordinary pointer
  return launch(32, 128, [] { shared<float>()[threadIdx.x + 1] = 1.f; });
}
CASE(store_before_shared_memory) {
  return launch(32, 128, [] { shared<float>()[static_cast<int>(threadIdx.x) - 1] = 1.f; });
}
CASE(store_past_the_end) {
  const auto to = std::make_unique<float[]>(32);
  return launch(32, 0, [&] { to[threadIdx.x + 1] = 1.f; });
}
CASE(load_of_a_freed_tensor) {
  auto from = std::make_unique<float[]>(32);
  const float* const stale = from.get();
  from.reset();
  return launch(32, 128, [&] { shared<float>()[threadIdx.x] = stale[threadIdx.x]; });
}

CASE(too_many_threads) {
  return launch(1025, 0, [] {});
}
CASE(too_much_shared_memory) {
  return launch(32, 228 << 10, [] {});
}

}  // namespace
