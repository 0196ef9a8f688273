// Stands before ATen's header of this name, as native/CPUBlas.h does before its own: the fp64 matmuls.
#pragma once

#include <ATen/ops/addmm.h>
#include_next <ATen/ops/mm.h>

#include "seen.h"

namespace at {

inline void seen_matmul(Tensor& out, const Tensor& left, const Tensor& right) {
  for (const Tensor& x : {left, right}) {
    flamingo::seen::read(x.const_data_ptr<double>(), x.size(0), x.size(1), x.stride(0));
  }
  flamingo::seen::written(out.mutable_data_ptr<double>(), out.size(0), out.size(1), out.stride(0));
}

inline Tensor& seen_mm_out(Tensor& out, const Tensor& left, const Tensor& right) {
  seen_matmul(out, left, right);
  return mm_out(out, left, right);
}

inline Tensor& seen_addmm_out(Tensor& out, const Tensor& added, const Tensor& left, const Tensor& right) {
  seen_matmul(out, left, right);
  return addmm_out(out, added, left, right);
}

}  // namespace at

#define mm_out seen_mm_out
#define addmm_out seen_addmm_out
