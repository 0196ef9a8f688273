// Stands before ATen's header of this name where our kernels are compiled with a sanitizer: oneDNN's code is not
// instrumented, so the sanitizer is told what a matmul reads and writes.
#pragma once

#include_next <ATen/native/CPUBlas.h>

#include "seen.h"

namespace at::native::cpublas {

template <typename in_t, typename out_t>
void seen_brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const in_t* a,
                 const in_t* b, out_t* c, bool is_vnni) {
  const int64_t paired = is_vnni ? 2 : 1;  // rows of b, one after the other in pairs
  flamingo::seen::read(a, m, k, lda);
  flamingo::seen::read(b, k / paired, n * paired, ldb * paired);
  flamingo::seen::written(c, m, n, ldc);
  brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, is_vnni);
}

}  // namespace at::native::cpublas

#define brgemm seen_brgemm
