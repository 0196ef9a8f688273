// Launchers of masked cross-attention. All pointers are to device memory; every call is asynchronous on its stream.
#pragma once

#include "cuda/attention.h"
#include "cuda/stream.h"

namespace flamingo {

struct MaskedSizes {
  int64_t B, T, K;
  int H, G, D;    // D at most 128
  int64_t beams;  // batch row b reads the keys of row b / beams
};

// start, end int32 [B, T]; o [B, T, H, D] contiguous; lse fp32 [B, H, T].
struct MaskedForward {
  MaskedSizes size;
  View q, k, v;
  const int32_t *start, *end;
  void* o;
  float* lse;
  float scale;
};

// What MaskedForward has, and: do [B, T, H, D]; scratch runs int32 [B, ceil(K / 64), 2] and delta fp32 [B, H, T];
// dq, dk, dv contiguous.
struct MaskedBackward {
  MaskedSizes size;
  View grad, q, k, v;
  const int32_t *start, *end;
  const void* o;
  const float* lse;
  int32_t* runs;
  float* delta;
  void *dq, *dk, *dv;
  float scale;
};

// Raise: std::invalid_argument for sizes or addresses that the kernels do not take, std::runtime_error where a launch
// fails.
void masked_cross_attention_forward(Precision precision, const MaskedForward& call, Stream stream);
void masked_cross_attention_decode(Precision precision, const MaskedForward& call, Stream stream);  // T is 1
void masked_cross_attention_backward(Precision precision, const MaskedBackward& call, Stream stream);

}  // namespace flamingo
