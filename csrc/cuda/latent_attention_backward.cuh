// Backward of latent attention: dq and the dk and dv of both sources of keys, in one pass, without atomics, the same to
// the bit every time.
//
//   p = exp(scale·⟨q, k⟩ - lse)    dp = do vᵀ     δ = Σ_d do·o
//   ds = p ∘ (dp - δ)              dv = pᵀ do     dk = scale·dsᵀ q     dq = scale·ds k
//
// Tiling: a block owns up to 64 query rows of one key head, 16 a warp, with dq in registers, and walks blocks of kKeys
// keys. Where these rows are all that the key head has (the 64 latents of a resampler), dk and dv of a block of keys
// are ready as soon as it has been walked, and everything is read and written once. Where there are more tiles, each
// leaves dk and dv of its own in fp32, where several blocks share the keys, each a dq; latent_attention_merge.cuh adds
// them up.
//
// Shared memory (bytes, e per element):  q and do: 2·64·D·e | kStages stages of k and v, later dk and dv: 2·kKeys·D·e
//   each | p and ds: 2·64·kScoreColumns·e | δ: 256
//   16-bit D = 64: 41 KiB, D = 128: 73 KiB; fp32 D = 64: 81 KiB, D = 128: 97 KiB.
//
// Bound: memory at 64 query rows.
// Occupancy: 4 warps on a multiprocessor, or more: one block where it has 100 KiB, two at D = 64 in 16 bits.
#pragma once

#include "cuda/latent_attention_tiles.cuh"
#include "cuda/softmax.cuh"

namespace flamingo {

template <Precision P, int D>
struct LatentBackwardTiling {
  using T = Element<P>;
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kWarps = kLatentRows / 16, kThreads = 32 * kWarps;
  static constexpr int kKeys = kHalf || D == 64 ? 32 : 16;
  static constexpr int kStages = kHalf || D < 128 ? 2 : 1;
  static constexpr int kParts = kWarps / (kKeys / 16), kColumns = D / kParts;  // of dk and dv, a warp's: 16 · kColumns
  static constexpr int kScoreColumns = 32;  // fp32: rows of 128 bytes, free of conflicts
  static constexpr int kScores = (2 * kLatentRows + 2 * kStages * kKeys) * D;
  static constexpr int kElements = kScores + 2 * kLatentRows * kScoreColumns;
  static constexpr size_t kBytes = kElements * sizeof(T) + kLatentRows * sizeof(float);
};

// δ of this warp's 16 rows, 8 lanes a row, into shared memory.
template <typename T, int D>
FLAMINGO_DEVICE void find_latent_delta(const LatentBackward& p, const LatentTile& tile, const Tile<T, D>& grad,
                                       float* delta) {
  constexpr int kLanes = 8, kPerChunk = Vector<T>::kSize;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int i = 16 * warp + lane / kLanes; i < 16 * warp + 16; i += 32 / kLanes) {
    float sum = 0;
    if (i < tile.count) {
      const T* const o = static_cast<const T*>(p.o) + tile.in_rows(p.in.size, 0, i);
      for (int d = lane % kLanes * kPerChunk; d < p.in.size.D; d += kLanes * kPerChunk) {
        const auto x = load_shared<Vector<T>>(grad.at(i, d)), y = load<Vector<T>>(o + d);
#pragma unroll
        for (int e = 0; e < kPerChunk; ++e) sum = fmaf(x[e], y[e], sum);
      }
    }
#pragma unroll
    for (int bits = kLanes / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(kWarp, sum, bits);
    if (lane % kLanes == 0) store_shared(delta + i, sum);
  }
  __syncwarp();
}

template <Precision P, int D>
__global__ void __launch_bounds__(LatentBackwardTiling<P, D>::kThreads, 1)
    latent_attention_bwd_kernel(const LatentBackward p) {
  using Tiling = LatentBackwardTiling<P, D>;
  using T = typename Tiling::T;
  using RowTile = Tile<T, D>;
  using ScoreTile = Tile<T, Tiling::kScoreColumns>;
  constexpr int kKeys = Tiling::kKeys, kThreads = Tiling::kThreads, kStages = Tiling::kStages, N = kKeys / 8;
  constexpr int kParts = Tiling::kParts, kColumns = Tiling::kColumns;
  SHARED_MEMORY(T, memory);
  const RowTile q_tile{memory}, do_tile{memory + kLatentRows * D};
  const RowTile k_tiles{memory + 2 * kLatentRows * D}, v_tiles{memory + (2 * kLatentRows + kStages * kKeys) * D};
  const ScoreTile p_tile{memory + Tiling::kScores};
  const ScoreTile ds_tile{memory + Tiling::kScores + kLatentRows * Tiling::kScoreColumns};
  auto* const delta_of = reinterpret_cast<float*>(memory + Tiling::kElements);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const LatentSizes& size = p.in.size;
  const LatentTile tile(size, blockIdx.x);
  const LatentKeys<T, kKeys> keys(p.in, tile.n, tile.g, true);
  const int begin = keys.share(tile.split, size.splits), end = keys.share(tile.split + 1, size.splits);
  const bool many_tiles = latent_tiles(size) > 1;

  const auto fetch_keys = [&](int block, int stage) {
    keys.template fetch_block<kThreads>(k_tiles.from_row(stage * kKeys), size.D, block, 0);
    keys.template fetch_block<kThreads>(v_tiles.from_row(stage * kKeys), size.D, block, 1);
  };
  if (begin < end) {
    const auto from = [&](const View& x) {
      return
          [&](int i) -> const T* { return i < tile.count ? static_cast<const T*>(x.data) + tile.in(x, i) : nullptr; };
    };
    fetch<kThreads, kLatentRows>(q_tile, size.D, from(p.in.q));
    fetch<kThreads, kLatentRows>(do_tile, size.D, from(p.grad));
    fetch_keys(begin, 0);
  }
  ptx::cp_async_commit();

  const int slot = 16 * warp + lane / 4;  // of this thread's first row; its second is 8 below
  float lse[2] = {}, delta[2] = {}, dq[D / 8][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = slot + 8 * half;
    if (i < tile.count) lse[half] = load<float>(p.lse + tile.in_stats(size, 0, i));
  }

  // dk or dv of a block of keys, aᵀ · b · scale: 16 keys and kColumns columns a warp. Into the memory of k or v, from
  // where write_keys takes them; or, as this tile's part, out.
  const int key0 = warp / kParts * 16, column = warp % kParts * kColumns;
  const auto row_of_key = [&](auto* to, int block, int key) -> decltype(to) {
    const int count = keys.in_media(block) ? size.S : size.latents, j = keys.first(block) + key;
    const int64_t part = many_tiles ? tile.index : 0;
    return j < count ? to + (((part * size.N + tile.n) * count + j) * size.G + tile.g) * size.D : nullptr;
  };
  const auto make_keys = [&](void* to, int block, bool any, const ScoreTile& a, const RowTile& b, float scale,
                             const RowTile& into) {
    float acc[Tiling::kColumns / 8][4] = {};
    if (any) multiply_tn<P, kLatentRows>(acc, a, key0, b, column);
    if (many_tiles) {
      store_fp32(acc, column, scale, scale, size.D,
                 [&](int i) { return row_of_key(static_cast<float*>(to), block, key0 + i); });
    } else {
      put(into.from_row(key0), acc, column, scale, scale);
    }
  };
  const auto write_keys = [&](void* to, int block, const RowTile& from) {
    flush<kKeys, D, kThreads>(from, size.D, 0, [&](int key) { return row_of_key(static_cast<T*>(to), block, key); });
  };

  int stage = 0;
  for (int block = begin; block < end; ++block, stage ^= kStages - 1) {
    const RowTile k_tile = k_tiles.from_row(stage * kKeys), v_tile = v_tiles.from_row(stage * kKeys);
    if constexpr (kStages == 1) {
      if (block > begin) fetch_keys(block, 0);
    } else {
      if (block + 1 < end) fetch_keys(block + 1, stage ^ 1);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<kStages - 1>();
    __syncthreads();
    if (block == begin) {
      find_latent_delta(p, tile, do_tile, delta_of);
      delta[0] = load_shared<float>(delta_of + slot), delta[1] = load_shared<float>(delta_of + slot + 8);
    }
    const Interval visible = keys.visible(block);
    const int j0 = keys.first(block);
    const bool any = j0 < visible.hi;
    if (any) {
      float s[N][4] = {}, dp[N][4] = {};
      multiply_nt<P>(s, q_tile.from_row(16 * warp), k_tile);
      multiply_nt<P>(dp, do_tile.from_row(16 * warp), v_tile);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool exists = slot + 8 * half < tile.count;
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[n][2 * half + e];
            float& y = dp[n][2 * half + e];
            const bool sees = exists && visible.sees(j0 + 8 * n + 2 * (lane % 4) + e);
            x = sees ? weight(x * p.in.scale, lse[half]) : 0.f;
            y = sees ? x * (y - delta[half]) : 0.f;
          }
        }
      }
      put(p_tile.from_row(16 * warp), s, 0, 1.f, 1.f);
      put(ds_tile.from_row(16 * warp), dp, 0, 1.f, 1.f);
      multiply_nn(dq, Operand<P, N>(dp), k_tile);
    }
    __syncthreads();  // k and v have been read, and p and ds written
    void* const dv = keys.in_media(block) ? p.dv_media : p.dv_latents;
    void* const dk = keys.in_media(block) ? p.dk_media : p.dk_latents;
    make_keys(dv, block, any, p_tile, do_tile, 1.f, v_tile);
    make_keys(dk, block, any, ds_tile, q_tile, p.in.scale, k_tile);
    if (!many_tiles) {
      __syncthreads();
      write_keys(dv, block, v_tile);
      write_keys(dk, block, k_tile);
    }
    __syncthreads();  // before their memory takes the next ones
  }

  if (size.splits > 1) {
    store_fp32(dq, 0, p.in.scale, p.in.scale, size.D, [&](int i) -> float* {
      const int row = 16 * warp + i;
      return row < tile.count ? static_cast<float*>(p.dq) + tile.in_rows(size, tile.split, row) : nullptr;
    });
  } else {
    const RowTile dq_tile = q_tile.from_row(16 * warp);
    put(dq_tile, dq, 0, p.in.scale, p.in.scale);
    __syncwarp();
    flush<16, D>(dq_tile, size.D, 0, [&](int i) -> T* {
      const int row = 16 * warp + i;
      return row < tile.count ? static_cast<T*>(p.dq) + tile.in_rows(size, 0, row) : nullptr;
    });
  }
}

}  // namespace flamingo
