// Forward of latent attention: o = softmax(scale · q kᵀ) v and its log-sum-exp, over the keys of a media and of its
// latents, which stay where they are.
//
// Tiling: a block owns up to 64 query rows of one key head, which are the 64 latents of a resampler, and walks the
// blocks of kKeys keys of the media, as many as there are visible ones, and then those of the latents. Few media with
// many keys make few such blocks: then several share the keys of a tile, each leaves an o and lse of its own in fp32,
// and latent_attention_merge.cuh makes one of them.
//
// Shared memory (bytes, e per element):  q, later o: 64·D·e | 2 stages of k: 2·kKeys·D·e | 2 stages of v
//   16-bit D = 64: 40 KiB, D = 128: 80 KiB; fp32 D = 64: 48 KiB, D = 128: 96 KiB.
//
// Bound: memory at 64 query rows (64 FLOPs a byte of k and v in 16 bits).
// Occupancy: 4 warps on a multiprocessor, or more: one block where it has 100 KiB, two at D = 64 in 16 bits.
//
// Pipeline: as in masked_cross_attention_forward.cuh.
#pragma once

#include "cuda/latent_attention_tiles.cuh"
#include "cuda/softmax.cuh"

namespace flamingo {

template <Precision P, int D>
struct LatentForwardTiling {
  using T = Element<P>;
  static constexpr int kWarps = kLatentRows / 16, kThreads = 32 * kWarps;
  static constexpr int kKeys = sizeof(T) == 2 ? 64 : 32;
  static constexpr size_t kBytes = (kLatentRows + 4 * kKeys) * D * sizeof(T);
};

template <Precision P, int D>
__global__ void __launch_bounds__(LatentForwardTiling<P, D>::kThreads, 1)
    latent_attention_fwd_kernel(const LatentForward p) {
  using Tiling = LatentForwardTiling<P, D>;
  using T = typename Tiling::T;
  using RowTile = Tile<T, D>;
  constexpr int kKeys = Tiling::kKeys, kThreads = Tiling::kThreads, N = kKeys / 8;
  SHARED_MEMORY(T, memory);
  const RowTile q_tile{memory}, k_tiles{memory + kLatentRows * D}, v_tiles{memory + (kLatentRows + 2 * kKeys) * D};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const LatentSizes& size = p.in.size;
  const LatentTile tile(size, blockIdx.x);
  const LatentKeys<T, kKeys> keys(p.in, tile.n, tile.g, false);
  const int begin = keys.share(tile.split, size.splits), end = keys.share(tile.split + 1, size.splits);

  if (begin < end) {
    fetch<kThreads, kLatentRows>(q_tile, size.D, [&](int i) -> const T* {
      return i < tile.count ? static_cast<const T*>(p.in.q.data) + tile.in(p.in.q, i) : nullptr;
    });
    keys.template fetch_block<kThreads>(k_tiles, size.D, begin, 0);
  }
  ptx::cp_async_commit();
  if (begin < end) keys.template fetch_block<kThreads>(v_tiles, size.D, begin, 1);
  ptx::cp_async_commit();

  const int slot = 16 * warp + lane / 4;  // of this thread's first row; its second is 8 below
  const bool mine = 16 * warp < tile.count;
  Softmax<D> state;
  int stage = 0;
  for (int block = begin; block < end; ++block, stage ^= 1) {
    const bool more = block + 1 < end;
    float s[N][4] = {};
    if (more) keys.template fetch_block<kThreads>(k_tiles.from_row((stage ^ 1) * kKeys), size.D, block + 1, 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<2>();
    __syncthreads();
    if (mine) {
      multiply_nt<P>(s, q_tile.from_row(16 * warp), k_tiles.from_row(stage * kKeys));
      const int visible = keys.visible(block).hi;
      state.see(s, p.in.scale, keys.first(block), Interval{0, slot < tile.count ? visible : 0},
                Interval{0, slot + 8 < tile.count ? visible : 0});
    }
    const Operand<P, N> weights(s);
    if (more) keys.template fetch_block<kThreads>(v_tiles.from_row((stage ^ 1) * kKeys), size.D, block + 1, 1);
    ptx::cp_async_commit();
    ptx::cp_async_wait<2>();
    __syncthreads();
    if (mine) multiply_nn(state.acc, weights, v_tiles.from_row(stage * kKeys));
  }

  const SoftmaxEnd result = state.finish();
  const int part = size.splits > 1 ? tile.split : 0;
  if (size.splits > 1) {
    store_fp32(state.acc, 0, result.inverse[0], result.inverse[1], size.D, [&](int i) -> float* {
      const int row = 16 * warp + i;
      return row < tile.count ? static_cast<float*>(p.o) + tile.in_rows(size, part, row) : nullptr;
    });
  } else {
    const RowTile o_tile = q_tile.from_row(16 * warp);  // read by this warp alone
    __syncwarp();
    put(o_tile, state.acc, 0, result.inverse[0], result.inverse[1]);
    __syncwarp();
    flush<16, D>(o_tile, size.D, 0, [&](int i) -> T* {
      const int row = 16 * warp + i;
      return row < tile.count ? static_cast<T*>(p.o) + tile.in_rows(size, part, row) : nullptr;
    });
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = slot + 8 * half;
    if (lane % 4 == 0 && i < tile.count) store(p.lse + tile.in_stats(size, part, i), result.lse[half]);
  }
}

}  // namespace flamingo
