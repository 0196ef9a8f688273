#pragma once

#include <cstdint>

namespace flamingo {

// c [m, n] (+)= a [m, k] · b [k, n], row-major, in fp64. ATen exports no fp64 gemm, so this is at::mm on views.
void matmul_fp64(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c,
                 int64_t ldc, bool accumulate);

}  // namespace flamingo
