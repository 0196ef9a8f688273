// Launchers of latent attention. All pointers are to device memory; every call is asynchronous on its stream.
#pragma once

#include "cuda/attention.h"
#include "cuda/stream.h"

namespace flamingo {

constexpr int kLatentRows = 64;  // query rows of a tile, which are those of a key head: row = query · (H / G) + r

struct LatentSizes {
  int64_t N;
  int R, S, latents;  // queries, tokens of a media, keys of the latents
  int H, G, D;        // D at most 128
  int splits;         // how many blocks of threads share the keys of a tile
};

struct LatentInputs {
  LatentSizes size;
  View q, k_media, v_media, k_latents, v_latents;
  const int32_t* lengths;  // [N], how many tokens of each media are visible; null: all
  float scale;
};

// o [N, R, H, D] and lse fp32 [N, H, R], contiguous. With several splits these are parts, [splits, ...], both in fp32.
struct LatentForward {
  LatentInputs in;
  void* o;
  float* lse;
};

// Sums of parts [splits, rows, D] in their order: out [rows, D]. With part_lse [splits, N, H, R], rows are [N, R, H],
// each part weighs as much as the keys it saw, and lse [N, H, R] is that of all of them.
struct LatentMerge {
  const float *parts, *part_lse;
  void* out;
  float* lse;
  int64_t rows;
  int R, H, D, splits;
};

// do [N, R, H, D]; o and lse as forward gave them, merged. dq contiguous, and with several splits parts as above;
// dk and dv contiguous, and with several tiles of query rows fp32 parts, [tiles, ...].
struct LatentBackward {
  LatentInputs in;
  View grad;
  const void* o;
  const float* lse;
  void *dq, *dk_media, *dv_media, *dk_latents, *dv_latents;
};

// Raise: std::invalid_argument for sizes or addresses that the kernels do not take, std::runtime_error where a launch
// fails.
void latent_attention_forward(Precision precision, const LatentForward& call, Stream stream);
void latent_attention_merge(Precision precision, const LatentMerge& call, Stream stream);
void latent_attention_backward(Precision precision, const LatentBackward& call, Stream stream);

}  // namespace flamingo
