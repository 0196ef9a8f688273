// What the runtime tells AddressSanitizer and ThreadSanitizer; nothing in a build without them.
//
// With ThreadSanitizer the runtime itself is compiled without it, so that its own bookkeeping orders nothing.
// CUSIM_TSAN then says that ThreadSanitizer is there.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef CUSIM_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
}
#endif

namespace cusim::sanitizer {

#ifdef CUSIM_TSAN

constexpr bool threads = true;
inline void acquire(void* token) { __tsan_acquire(token); }
inline void release(void* token) { __tsan_release(token); }
inline void reads(const void* address, size_t size) { __tsan_read_range(const_cast<void*>(address), size); }
inline void writes(void* address, size_t size) { __tsan_write_range(address, size); }
// Hides the library calls (memcpy, malloc) of the runtime, which ThreadSanitizer intercepts.
struct Quiet {
  Quiet() { __tsan_ignore_thread_begin(); }
  ~Quiet() { __tsan_ignore_thread_end(); }
};

#else

constexpr bool threads = false;
inline void acquire(void*) {}
inline void release(void*) {}
inline void reads(const void*, size_t) {}
inline void writes(void*, size_t) {}
struct Quiet {
  Quiet() {}  // not trivial, so that an unused one is no warning
};

#endif

#ifdef __SANITIZE_ADDRESS__
constexpr bool addresses = true;
inline void forbid(void* address, size_t size) { __asan_poison_memory_region(address, size); }
inline void allow(void* address, size_t size) { __asan_unpoison_memory_region(address, size); }
#else
constexpr bool addresses = false;
inline void forbid(void*, size_t) {}
inline void allow(void*, size_t) {}
#endif

}  // namespace cusim::sanitizer
