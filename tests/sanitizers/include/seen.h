// Tells the sanitizer what code without instrumentation reads and writes.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_read_range(void* begin, unsigned long bytes);
extern "C" void __tsan_write_range(void* begin, unsigned long bytes);
#else
extern "C" void __asan_loadN(void* begin, unsigned long bytes);
extern "C" void __asan_storeN(void* begin, unsigned long bytes);
#endif

namespace flamingo::seen {

// `rows` rows of `columns` elements, `ld` apart.
template <typename T>
void read(const T* x, int64_t rows, int64_t columns, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
#if defined(__SANITIZE_THREAD__)
    __tsan_read_range(const_cast<T*>(x + r * ld), columns * sizeof(T));
#else
    __asan_loadN(const_cast<T*>(x + r * ld), columns * sizeof(T));
#endif
  }
}

template <typename T>
void written(T* x, int64_t rows, int64_t columns, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
#if defined(__SANITIZE_THREAD__)
    __tsan_write_range(x + r * ld, columns * sizeof(T));
#else
    __asan_storeN(x + r * ld, columns * sizeof(T));
#endif
  }
}

}  // namespace flamingo::seen
