#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "sanitizers.h"

#ifndef __x86_64__
#error "cusim_switch is written for x86-64 alone"
#endif

// Saves what a call must keep, changes the stack, and returns to where that stack was left.
extern "C" void cusim_switch(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.type cusim_switch,@function
cusim_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size cusim_switch,.-cusim_switch
)");

namespace cusim {
namespace {

struct Caller {  // of resume
  void* stack_pointer = nullptr;
  void* tsan_fiber = nullptr;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
#endif
} caller;
[[maybe_unused]] char released;  // ThreadSanitizer: by every fiber

}  // namespace

void Fiber::prepare(char* stack, void (*entry)()) {
  stack_ = stack;
  sanitizer::allow(stack, stack_size);  // what fibers left there that never returned
  auto* top = reinterpret_cast<void**>(stack + stack_size - 64);
  *--top = nullptr;  // where a return of `entry` would go
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  stack_pointer_ = top;
#ifdef CUSIM_TSAN
  tsan_fiber_ = __tsan_create_fiber(0);
#endif
}

void Fiber::resume() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&caller.fake_stack, stack_, stack_size);
#endif
#ifdef CUSIM_TSAN
  caller.tsan_fiber = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_fiber_, 1);  // 1: a switch is no synchronisation
#endif
  cusim_switch(&caller.stack_pointer, stack_pointer_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(caller.fake_stack, nullptr, nullptr);
#endif
}

void Fiber::entered() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &caller.bottom, &caller.size);
#endif
}

void Fiber::leave([[maybe_unused]] bool for_good) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, caller.bottom, caller.size);
#endif
#ifdef CUSIM_TSAN
  __tsan_switch_to_fiber(caller.tsan_fiber, 1);
#endif
  cusim_switch(&stack_pointer_, caller.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack_, &caller.bottom, &caller.size);
#endif
}

void Fiber::suspend() { leave(false); }

void Fiber::finish() {
  leave(true);
  __builtin_trap();  // nobody resumes it
}

void Fiber::release() {
#ifdef CUSIM_TSAN
  void* const ours = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_fiber_, 1);
  __tsan_release(&released);
  __tsan_switch_to_fiber(ours, 1);
  __tsan_destroy_fiber(tsan_fiber_);
#endif
}

void acquire_released() { sanitizer::acquire(&released); }

char* allocate_stacks(size_t count) {
  void* memory = mmap(nullptr, count * Fiber::stack_size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

void release_stacks(char* stacks, size_t count) {
  sanitizer::allow(stacks, count * Fiber::stack_size);
  munmap(stacks, count * Fiber::stack_size);
}

}  // namespace cusim
