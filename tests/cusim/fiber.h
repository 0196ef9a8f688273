// A stack of its own for each thread of a block, and the switch to it and back.
#pragma once

#include <cstddef>

namespace cusim {

class Fiber {
 public:
  static constexpr size_t stack_size = 256 << 10;

  // The first `resume` calls `entry` on `stack`; it must end with `finish`.
  void prepare(char* stack, void (*entry)());
  // Runs until `suspend` or `finish` is called on it. Only where no fiber runs.
  void resume();
  void suspend();
  void finish();
  // Must be the first thing that `entry` does.
  static void entered();
  // Forgets the fiber, finished or not.
  void release();

 private:
  void leave(bool for_good);

  char* stack_ = nullptr;
  void* stack_pointer_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* tsan_fiber_ = nullptr;
};

// After a launch: what released fibers did comes before what follows. They do not come before each other.
void acquire_released();

// Memory for `count` stacks. Contents stay from block to block, as those of registers do.
char* allocate_stacks(size_t count);
void release_stacks(char* stacks, size_t count);

}  // namespace cusim
