// What backward of masked cross-attention needs to know first: which tokens see a block of keys, and δ of the queries
// that see several blocks. (δ of the others comes out of the one pass over their block.)
//
// Tiling: 256 threads. The first blocks of the grid take kBlocksOfKeys blocks of keys each and look at all tokens of a
// row, one a thread: runs [B, blocks of keys, 2] are the first and the last token (plus 1) that see any key of it, 0
// and 0 where none does. The others take kRows queries: delta [B, H, T] = Σ_d do·o, 8 lanes a query with 16-byte loads.
// No other queries are read, nor is their delta written.
//
// Shared memory (bytes): 8·kBlocksOfKeys·warps = 512. Bound: memory.
// Occupancy: 32 warps on a multiprocessor, or more.
#pragma once

#include "cuda/intervals.cuh"
#include "cuda/masked_cross_attention.h"
#include "cuda/tile.cuh"

namespace flamingo {

constexpr int kBackwardKeys = 64;  // of a block of keys: one media of 64 latents

FLAMINGO_DEVICE bool sees_several_blocks(const Interval& x) {
  return x.sees() && x.lo / kBackwardKeys != (x.hi - 1) / kBackwardKeys;
}

struct MaskedPrepareTiling {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kBlocksOfKeys = 8;
  static constexpr int kLanes = 8, kRows = 128;
  static constexpr size_t kBytes = kWarps * kBlocksOfKeys * sizeof(Interval);
};

FLAMINGO_DEVICE void find_runs(const MaskedBackward& p, int64_t b, int first_block, Interval* found) {
  using Tiling = MaskedPrepareTiling;
  const int K = static_cast<int>(p.size.K), T_ = static_cast<int>(p.size.T);
  const int blocks = (K + kBackwardKeys - 1) / kBackwardKeys, warp = threadIdx.x / 32;
  Interval run[Tiling::kBlocksOfKeys];
#pragma unroll
  for (auto& each : run) each = {INT_MAX, 0};
  for (int t = threadIdx.x; t < T_; t += Tiling::kThreads) {
    const Interval token = interval_at(p.start, p.end, b * T_ + t, K);
    if (!token.sees()) continue;
    const int from = token.lo / kBackwardKeys - first_block, to = (token.hi - 1) / kBackwardKeys - first_block;
#pragma unroll
    for (int i = 0; i < Tiling::kBlocksOfKeys; ++i) {
      if (from <= i && i <= to) run[i] = {min(run[i].lo, t), max(run[i].hi, t + 1)};
    }
  }
#pragma unroll
  for (int i = 0; i < Tiling::kBlocksOfKeys; ++i) {
    const Interval together{__reduce_min_sync(kWarp, run[i].lo), __reduce_max_sync(kWarp, run[i].hi)};
    if (threadIdx.x % 32 == 0) store_shared(found + warp * Tiling::kBlocksOfKeys + i, together);
  }
  __syncthreads();
  const int i = threadIdx.x;
  if (i < Tiling::kBlocksOfKeys && first_block + i < blocks) {
    Interval all{INT_MAX, 0};
    for (int w = 0; w < Tiling::kWarps; ++w) {
      const auto one = load_shared<Interval>(found + w * Tiling::kBlocksOfKeys + i);
      all = {min(all.lo, one.lo), max(all.hi, one.hi)};
    }
    if (all.lo >= all.hi) all = {0, 0};
    store(p.runs + 2 * (b * blocks + first_block + i), all);
  }
}

template <typename T>
FLAMINGO_DEVICE void find_delta(const MaskedBackward& p, int64_t first_row) {
  using Tiling = MaskedPrepareTiling;
  constexpr int kGroups = Tiling::kThreads / Tiling::kLanes, kPerChunk = Vector<T>::kSize;
  const int lane = threadIdx.x % Tiling::kLanes, H = p.size.H, D = p.size.D;
  const int64_t rows = p.size.B * H * p.size.T;
#pragma unroll
  for (int i = 0; i < Tiling::kRows; i += kGroups) {
    const int64_t row = first_row + i + threadIdx.x / Tiling::kLanes;  // (b · H + h) · T + t
    const int64_t t = row % p.size.T, h = row / p.size.T % H, b = row / p.size.T / H;
    const bool wanted =
        row < rows && sees_several_blocks(interval_at(p.start, p.end, b * p.size.T + t, static_cast<int>(p.size.K)));
    float sum = 0;
    if (wanted) {
      const T* const grad = static_cast<const T*>(p.grad.data) + b * p.grad.row + t * p.grad.token + h * p.grad.head;
      const T* const o = static_cast<const T*>(p.o) + ((b * p.size.T + t) * H + h) * D;
      for (int d = lane * kPerChunk; d < D; d += Tiling::kLanes * kPerChunk) {
        const auto x = load<Vector<T>>(grad + d), y = load<Vector<T>>(o + d);
#pragma unroll
        for (int e = 0; e < kPerChunk; ++e) sum = fmaf(x[e], y[e], sum);
      }
    }
#pragma unroll
    for (int bits = Tiling::kLanes / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(kWarp, sum, bits);
    if (lane == 0 && wanted) store(p.delta + row, sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(MaskedPrepareTiling::kThreads)
    masked_cross_attention_bwd_prepare_kernel(const MaskedBackward p) {
  using Tiling = MaskedPrepareTiling;
  SHARED_MEMORY(Interval, found);
  const int blocks = (static_cast<int>(p.size.K) + kBackwardKeys - 1) / kBackwardKeys;
  const int parts = (blocks + Tiling::kBlocksOfKeys - 1) / Tiling::kBlocksOfKeys;
  const int64_t of_keys = parts * p.size.B;
  if (blockIdx.x < of_keys) {
    find_runs(p, blockIdx.x / parts, blockIdx.x % parts * Tiling::kBlocksOfKeys, found);
  } else {
    find_delta<T>(p, (blockIdx.x - of_keys) * Tiling::kRows);
  }
}

}  // namespace flamingo
