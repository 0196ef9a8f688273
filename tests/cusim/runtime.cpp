// Launches, and which thread runs next.
#include "runtime.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <string>

#include "block.h"
#include "counters.h"
#include "sanitizers.h"

namespace cusim {

Thread* current;
uint3 block_index;
dim3 block_size, grid_size;
Options options;
Block block;

namespace {

const char* kernel_name;
const std::function<void()>* kernel_body;
std::exception_ptr error;
uint64_t random_state;

uint32_t draw() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>(random_state >> 32);
}

void entry() {
  Fiber::entered();
  ThreadState& thread = self();
  try {
    (*kernel_body)();
    thread.exited = true;
    depart(thread);
    check_barriers_after_exit(thread);
  } catch (...) {
    error = std::current_exception();
  }
  thread.fiber.finish();
}

int nth_bit(uint32_t mask, int n) {
  for (; n > 0; n--) mask &= mask - 1;
  return __builtin_ctz(mask);
}

// In random order the warps have priorities, so that one runs as far ahead of the others as barriers let it, and now
// and then a priority changes. The lanes of a warp take turns at random.
ThreadState* next_thread() {
  const bool random = options.order == Order::random;
  WarpState* chosen = nullptr;
  for (WarpState& warp : block.warps)
    if (warp.ready && (!chosen || warp.priority > chosen->priority)) chosen = &warp;
  if (!chosen) return nullptr;
  int lane = options.order == Order::descending ? 31 - __builtin_clz(chosen->ready) : __builtin_ctz(chosen->ready);
  if (random) {
    const uint32_t drawn = draw();
    lane = nth_bit(chosen->ready, static_cast<int>((drawn & 0xffff) % __builtin_popcount(chosen->ready)));
    if (drawn >> 16 < 0x10000 / 256) chosen->priority = draw();
  }
  chosen->ready &= ~(1u << lane);
  return &block.threads[(chosen - block.warps.data()) * 32 + lane];
}

void start_threads(char* stacks) {
  const int count = static_cast<int>(block_size.x * block_size.y * block_size.z);
  block.threads = std::vector<ThreadState>(count);
  block.warps = std::vector<WarpState>((count + 31) / 32);
  for (Barrier& barrier : block.barriers) barrier = {};
  block.alive = count;
  for (size_t i = 0; i < block.warps.size(); i++) {
    const auto index = static_cast<uint32_t>(i);
    block.warps[i].priority = options.order == Order::random       ? draw()
                              : options.order == Order::descending ? index
                                                                   : ~index;
  }
  for (int i = 0; i < count; i++) {
    ThreadState& thread = block.threads[i];
    const auto linear = static_cast<unsigned>(i);
    thread.index = {linear % block_size.x, linear / block_size.x % block_size.y,
                    linear / (block_size.x * block_size.y)};
    thread.linear = i;
    thread.warp = i / 32;
    thread.lane = i % 32;
    block.warps[thread.warp].alive |= 1u << thread.lane;
    make_ready(thread);
    thread.fiber.prepare(stacks + i * Fiber::stack_size, entry);
  }
}

[[noreturn]] void deadlock() {
  std::map<std::string, std::string> threads_by_place;
  for (const ThreadState& thread : block.threads) {
    if (thread.exited) continue;
    const Site& at = thread.waits_at;
    std::string& list =
        threads_by_place[std::string(at.file) + ":" + std::to_string(at.line) + " (" + thread.waits_for + ")"];
    if (list.size() < 60)
      list += (list.empty() ? "" : " ") + std::to_string(thread.linear);
    else if (list.back() != '.')
      list += " ...";
  }
  std::string text;
  for (const auto& [place, threads] : threads_by_place) text += "\n  at " + place + ": threads " + threads;
  fail("deadlock: %d threads wait for ever%s", block.alive, text.c_str());
}

// Ends a block, also one that failed.
struct BlockMemory {
  explicit BlockMemory(size_t shared_bytes) { allocate_shared_memory(shared_bytes); }
  ~BlockMemory() {
    current = nullptr;
    for (ThreadState& thread : block.threads) thread.fiber.release();
    block.threads.clear();
    release_shared_memory();
  }
};

void run_block(char* stacks, size_t shared_bytes) {
  const BlockMemory memory(shared_bytes);
  start_threads(stacks);
  while (ThreadState* thread = next_thread()) {
    current = thread;
    thread->fiber.resume();
    if (error) std::rethrow_exception(error);
    current = nullptr;
  }
  if (block.alive) deadlock();
  for (size_t warp = 0; warp < block.warps.size(); warp++) count_accesses_of(static_cast<int>(warp));
  check_shared_memory_margins();
  counters.blocks++;
}

std::vector<uint64_t> order_of_blocks(uint64_t count) {
  std::vector<uint64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (options.order == Order::descending) std::reverse(order.begin(), order.end());
  if (options.order == Order::random)
    for (uint64_t i = count; i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
  return order;
}

// The stacks of a launch. What ThreadSanitizer knows of a stack must not outlive its fiber: it then gets new ones each
// time.
class Stacks {
 public:
  explicit Stacks(size_t count) : count_(count) {}
  ~Stacks() {
    if (memory_) release_stacks(memory_, count_);
    acquire_released();
  }
  char* get() {
    if (memory_ && sanitizer::threads) {
      release_stacks(memory_, count_);
      memory_ = nullptr;
    }
    if (!memory_) memory_ = allocate_stacks(count_);
    return memory_;
  }

 private:
  size_t count_;
  char* memory_ = nullptr;
};

void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64)
    fail("a block of %u x %u x %u threads: there can be 1 to 1024", block.x, block.y, block.z);
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    fail("a grid of %u x %u x %u blocks: there can be 1 to 2147483647 x 65535 x 65535", grid.x, grid.y, grid.z);
  constexpr size_t most = 227 << 10;  // of sm_90 and sm_100; other chips have less
  if (shared_bytes > most) fail("%zu bytes of shared memory: no chip gives a block more than %zu", shared_bytes, most);
}

}  // namespace

bool Site::operator==(const Site& other) const {
  return line == other.line && (file == other.file || strcmp(file, other.file) == 0);
}

void fail(const char* format, ...) {
  char text[4096];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  char where[256] = "";
  if (current) {
    const uint3 thread = current->index;
    snprintf(where, sizeof(where), ", block (%u, %u, %u), thread (%u, %u, %u)", block_index.x, block_index.y,
             block_index.z, thread.x, thread.y, thread.z);
  }
  throw Error(std::string("cusim: kernel ") + (kernel_name ? kernel_name : "?") + where + ": " + text);
}

void make_ready(const ThreadState& thread) { block.warps[thread.warp].ready |= 1u << thread.lane; }

void wait(const char* for_what, Site at) {
  ThreadState& thread = self();
  thread.waits_for = for_what;
  thread.waits_at = at;
  counters.switches++;
  thread.fiber.suspend();
}

void launch(const char* kernel, dim3 grid, dim3 block_dimensions, size_t shared_bytes,
            const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const sanitizer::Quiet quiet;
  kernel_name = kernel;
  kernel_body = &body;
  error = nullptr;
  current = nullptr;
  check_launch(grid, block_dimensions, shared_bytes);
  grid_size = grid;
  block_size = block_dimensions;
  random_state = 0x9E3779B97F4A7C15u ^ (options.seed + 1) * 0xD1B54A32D192ED03u;
  Stacks stacks(size_t{block_size.x} * block_size.y * block_size.z);
  for (const uint64_t index : order_of_blocks(uint64_t{grid.x} * grid.y * grid.z)) {
    block_index = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                   static_cast<unsigned>(index / grid.x / grid.y)};
    run_block(stacks.get(), shared_bytes);
  }
  counters.launches++;
}

}  // namespace cusim
