// Stands before ATen's header of this name where our kernels are compiled with ThreadSanitizer: what a matmul reads and
// writes is told to the sanitizer, since oneDNN's code is not instrumented.
#pragma once

#include_next <ATen/native/CPUBlas.h>

extern "C" void __tsan_read_range(void* begin, unsigned long bytes);
extern "C" void __tsan_write_range(void* begin, unsigned long bytes);

namespace at::native::cpublas {

template <typename in_t, typename out_t>
void seen_brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const in_t* a,
                 const in_t* b, out_t* c, bool is_vnni) {
  const auto read = [](const in_t* row, int64_t count) {
    __tsan_read_range(const_cast<in_t*>(row), count * sizeof(in_t));
  };
  const int64_t paired = is_vnni ? 2 : 1;  // rows of b, one after the other in pairs
  for (int64_t i = 0; i < m; ++i) read(a + i * lda, k);
  for (int64_t i = 0; i < k; i += paired) read(b + i * ldb, n * paired);
  for (int64_t i = 0; i < m; ++i) __tsan_write_range(c + i * ldc, n * sizeof(out_t));
  brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, is_vnni);
}

}  // namespace at::native::cpublas

#define brgemm seen_brgemm
