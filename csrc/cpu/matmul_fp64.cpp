#include "matmul_fp64.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

namespace flamingo {

void matmul_fp64(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c,
                 int64_t ldc, bool accumulate) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto view = [](const double* data, int64_t rows, int64_t columns, int64_t stride) {
    return at::from_blob(const_cast<double*>(data), {rows, columns}, {stride, 1}, at::kDouble);
  };
  at::Tensor out = view(c, m, n, ldc);
  const at::Tensor left = view(a, m, k, lda), right = view(b, k, n, ldb);
  if (accumulate) {
    at::addmm_out(out, out, left, right);
  } else {
    at::mm_out(out, left, right);
  }
}

}  // namespace flamingo
