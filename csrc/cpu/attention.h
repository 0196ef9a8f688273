// What the host side of the attention ops (attention_host.cpp) hands to their kernels (attention_{forward,backward}_
// kernel.cpp, compiled once per ISA). There is one set of kernels: masked cross-attention, whose key axis may be made
// of two tensors, one behind the other.
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
  int64_t kv_rows, keys, kv_heads;  // B', K, G; of both sources together
  int64_t dim;                      // D
};

// The tensors of the positions `first` .. `first + keys` of the key axis.
struct KeySource {
  int64_t first, keys;
  const void *k, *v;
  Strides k_strides, v_strides;
  void *dk = nullptr, *dv = nullptr;  // contiguous; for backward
};

// The second source begins at Plan::border; it may have no keys, and so may the first.
struct AttentionArgs {
  AttentionSizes size;
  const void* q;
  Strides q_strides;
  KeySource sources[2];
  const int32_t *start, *end;  // [B, T], contiguous, checked
  double softmax_scale;
  const Plan* plan;
};

// lse is float, double for double inputs; o is contiguous.
struct ForwardArgs : AttentionArgs {
  void *o, *lse;
};

// dq is contiguous.
struct BackwardArgs : AttentionArgs {
  const void *d_out, *o, *lse;
  Strides d_out_strides;
  void* dq;
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
