// What the host side of masked_cross_attention (masked_cross_attention.cpp) hands to its kernels
// (masked_cross_attention_{forward,backward}_kernel.cpp, compiled once per ISA).
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "plan.h"

namespace flamingo {

// Element strides of a [rows, tokens, heads, head dim] tensor whose last dimension is contiguous.
struct Strides {
  int64_t row, token, head;
};

struct AttentionSizes {
  int64_t rows, tokens, heads;      // B, T, H
  int64_t kv_rows, keys, kv_heads;  // B', K, G
  int64_t dim;                      // D
};

// lse is float, double for double inputs; o is contiguous.
struct ForwardArgs {
  AttentionSizes size;
  const void *q, *k, *v;
  Strides q_strides, k_strides, v_strides;
  const int32_t *start, *end;  // [B, T], contiguous, checked
  double softmax_scale;
  void *o, *lse;
  const Plan* plan;
};

// dq, dk and dv are contiguous.
struct BackwardArgs {
  AttentionSizes size;
  const void *d_out, *q, *k, *v, *o, *lse;
  Strides d_out_strides, q_strides, k_strides, v_strides;
  const int32_t *start, *end;
  double softmax_scale;
  void *dq, *dk, *dv;
  const Plan* plan;
};

// The kernels of each ISA. `narrow_tiles`: bf16 matmuls take bf16 operands instead of fp32 ones.
namespace DEFAULT {
void attention_forward(c10::ScalarType, bool narrow_tiles, const ForwardArgs&);
void attention_backward(c10::ScalarType, bool narrow_tiles, const BackwardArgs&);
}  // namespace DEFAULT
#if defined(__x86_64__)
namespace AVX2 {
void attention_forward(c10::ScalarType, bool narrow_tiles, const ForwardArgs&);
void attention_backward(c10::ScalarType, bool narrow_tiles, const BackwardArgs&);
}  // namespace AVX2
namespace AVX512 {
void attention_forward(c10::ScalarType, bool narrow_tiles, const ForwardArgs&);
void attention_backward(c10::ScalarType, bool narrow_tiles, const BackwardArgs&);
}  // namespace AVX512
#endif

}  // namespace flamingo
