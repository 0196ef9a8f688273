// One result of the parts that several blocks of latent attention left, in a fixed order:
//
//   out = Σ parts        or, of attention:   lse = log Σ exp(part_lse),   out = Σ exp(part_lse - lse) · parts
//
// Tiling: a thread has 16 bytes of out, and reads as many elements of each part.
// Shared memory: none. Bound: memory. Occupancy: 40 warps on a multiprocessor, or more.
#pragma once

#include "cuda/latent_attention.h"
#include "cuda/softmax.cuh"

namespace flamingo {

constexpr int kLatentMergeThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kLatentMergeThreads) latent_attention_merge_kernel(const LatentMerge p) {
  constexpr int kElements = Vector<T>::kSize, kPerLoad = Vector<float>::kSize;
  const int64_t chunk = int64_t{blockIdx.x} * kLatentMergeThreads + threadIdx.x;
  const int chunks = p.D / kElements, d = static_cast<int>(chunk % chunks) * kElements;
  const int64_t row = chunk / chunks;
  if (row >= p.rows) return;
  const bool weighted = p.part_lse != nullptr;
  const int64_t n = row / p.H / p.R, stat = (n * p.H + row % p.H) * p.R + row / p.H % p.R;

  float most = -INFINITY, total = 0;
  if (weighted) {
    for (int s = 0; s < p.splits; ++s) most = fmaxf(most, load<float>(p.part_lse + s * p.rows + stat));
  }
  const float shift = most == -INFINITY ? 0.f : most;
  float sums[kElements] = {};
#pragma unroll 2
  for (int s = 0; s < p.splits; ++s) {
    const float weight = weighted ? exp_of(load<float>(p.part_lse + s * p.rows + stat) - shift) : 1.f;
    total += weight;
#pragma unroll
    for (int i = 0; i < kElements; i += kPerLoad) {
      const auto part = load<Vector<float>>(p.parts + (s * p.rows + row) * p.D + d + i);
#pragma unroll
      for (int e = 0; e < kPerLoad; ++e) sums[i + e] = fmaf(weight, part[e], sums[i + e]);
    }
  }
  const float inverse = !weighted ? 1.f : total == 0 ? 0.f : 1.f / total;
  Vector<T> out;
#pragma unroll
  for (int i = 0; i < kElements; ++i) out.set(i, sums[i] * inverse);
  store(static_cast<T*>(p.out) + row * p.D + d, out);
  if (weighted && d == 0) store(p.lse + stat, total == 0 ? -INFINITY : most + logf(total));
}

}  // namespace flamingo
