// Launches, threads, barriers and warp collectives: one fiber for each thread, in an order drawn from a seed.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <typeinfo>

namespace cusim {

// A place in the source. As a default argument, `Site site = Site::here()` is the place of the call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const;
};

// What a kernel did that CUDA does not allow. `launch` throws it, and the rest of the launch does not run.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

struct Thread {
  uint3 index;
  int linear, warp, lane;
};
extern Thread* current;  // the thread that runs; null outside of a kernel
extern uint3 block_index;
extern dim3 block_size, grid_size;

// Runs `body` once for each thread. Dynamic shared memory of exactly `shared_bytes` is new for each block, and NaN.
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// The same of a kernel with one parameter, known by its symbol, which `launches` in counters.h then lists.
template <auto kernel>
struct Symbol {};
void note_launch(const std::type_info& symbol, dim3 grid, dim3 block, size_t shared_bytes, const void* parameters,
                 size_t parameters_bytes);
void note_end();
template <auto kernel, class Parameters>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const Parameters& parameters) {
  note_launch(typeid(Symbol<kernel>), grid, block, shared_bytes, &parameters, sizeof(parameters));
  launch(name, grid, block, shared_bytes, [&] { kernel(parameters); });
  note_end();
}

// Which of the threads that can run comes next. A launch draws anew from the seed, so that it can be repeated.
enum class Order { random, ascending, descending };
struct Options {
  uint64_t seed = 0;
  Order order = Order::random;
};
extern Options options;

// __syncthreads: the whole block, at one place of the source.
void block_barrier(Site site);
// bar.sync and bar.arrive: `threads`, a multiple of 32, meet at barrier `id` of 0..15.
void barrier_sync(int id, int threads, Site site = Site::here());
void barrier_arrive(int id, int threads, Site site = Site::here());

void warp_barrier(uint32_t mask, Site site);

// What each lane brings to a collective, and then what each takes from it.
struct Slots {
  alignas(16) unsigned char lane[32][48];
};
using Combine = void (*)(Slots&);
// Waits until all lanes of `mask` are here with the same operation at the same place, each with `size` bytes. The last
// to come runs `combine`, if any, on what they brought. The result may be read until the lane's next collective or
// barrier.
const Slots& collective(uint32_t mask, const char* operation, const void* mine, size_t size, Combine combine,
                        Site site);

}  // namespace cusim
