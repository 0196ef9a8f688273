// Where the blocks of latent attention stand: a tile of query rows, and its share of the keys of two sources.
#pragma once

#include "cuda/intervals.cuh"
#include "cuda/latent_attention.h"
#include "cuda/tile.cuh"

namespace flamingo {

__host__ __device__ constexpr int latent_tiles(const LatentSizes& size) {
  return (size.R * (size.H / size.G) + kLatentRows - 1) / kLatentRows;
}

// Query rows of key head g of media n.
struct LatentTile {
  int64_t n;
  int g, split, index, row0, count, group;

  FLAMINGO_DEVICE LatentTile(const LatentSizes& size, int64_t block) : group(size.H / size.G) {
    const int tiles = latent_tiles(size);
    index = static_cast<int>(block % tiles);
    split = static_cast<int>(block / tiles % size.splits);
    g = static_cast<int>(block / tiles / size.splits % size.G);
    n = block / tiles / size.splits / size.G;
    row0 = index * kLatentRows;
    count = min(size.R * group - row0, kLatentRows);
  }
  FLAMINGO_DEVICE int query(int i) const { return (row0 + i) / group; }
  FLAMINGO_DEVICE int head(int i) const { return g * group + (row0 + i) % group; }

  // The offset of row i in x, of which each row of D elements has its own strides.
  FLAMINGO_DEVICE int64_t in(const View& x, int i) const { return n * x.row + query(i) * x.token + head(i) * x.head; }
  // In a contiguous [.., N, R, H, D] or [.., N, H, R], of this split's part where there are parts.
  FLAMINGO_DEVICE int64_t in_rows(const LatentSizes& size, int part, int i) const {
    return (((part * size.N + n) * size.R + query(i)) * size.H + head(i)) * size.D;
  }
  FLAMINGO_DEVICE int64_t in_stats(const LatentSizes& size, int part, int i) const {
    return ((part * size.N + n) * size.H + head(i)) * size.R + query(i);
  }
};

// The keys of a media and of its latents in blocks of kKeys, those of the media first.
template <typename T, int kKeys>
struct LatentKeys {
  int length, latents, of_media;  // visible keys of the media, and blocks of it
  const T *media[2], *of_latents[2];
  int64_t media_stride[2], latents_stride[2];

  // blocks_of: how many tokens of the media are in blocks, at least those that are visible.
  FLAMINGO_DEVICE LatentKeys(const LatentInputs& in, int64_t n, int g, bool all_of_media) : latents(in.size.latents) {
    const int S = in.size.S;
    length = in.lengths == nullptr ? S : min(max(load<int32_t>(in.lengths + n), 0), S);
    of_media = ((all_of_media ? S : length) + kKeys - 1) / kKeys;
    const auto base = [&](const View& x) { return static_cast<const T*>(x.data) + n * x.row + g * x.head; };
    media[0] = base(in.k_media), media[1] = base(in.v_media);
    of_latents[0] = base(in.k_latents), of_latents[1] = base(in.v_latents);
    media_stride[0] = in.k_media.token, media_stride[1] = in.v_media.token;
    latents_stride[0] = in.k_latents.token, latents_stride[1] = in.v_latents.token;
  }
  // Where a share of the blocks begins; that of `splits` is where they end.
  FLAMINGO_DEVICE int share(int split, int splits) const {
    const int64_t blocks = of_media + (latents + kKeys - 1) / kKeys;
    return static_cast<int>(blocks * split / splits);
  }
  FLAMINGO_DEVICE bool in_media(int block) const { return block < of_media; }
  FLAMINGO_DEVICE int first(int block) const { return (in_media(block) ? block : block - of_media) * kKeys; }
  // Which keys of the block's source are visible.
  FLAMINGO_DEVICE Interval visible(int block) const { return {0, in_media(block) ? length : latents}; }

  // Keys (which = 0) or values (1) of a block into a tile, zeros for those that are not visible.
  template <int threads, int D>
  FLAMINGO_DEVICE void fetch_block(const Tile<T, D>& into, int d, int block, int which) const {
    const T* const from = in_media(block) ? media[which] : of_latents[which];
    const int64_t stride = in_media(block) ? media_stride[which] : latents_stride[which];
    const int j0 = first(block), end = visible(block).hi;
    fetch<threads, kKeys>(into, d,
                          [=](int key) -> const T* { return j0 + key < end ? from + (j0 + key) * stride : nullptr; });
  }
};

// Accumulators [16, 8N] times `scale`, as fp32 from `column` on of rows of d elements in global memory. to(row) points
// to one, null for one to leave out.
template <int N, typename Target>
FLAMINGO_DEVICE void store_fp32(const float (&acc)[N][4], int column, float scale_top, float scale_low, int d,
                                const Target& to) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* const target = to(lane / 4 + 8 * half);
    if (target == nullptr) continue;
    const float scale = half ? scale_low : scale_top;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int at = column + 8 * n + 2 * (lane % 4);
      Vector<float, 2> pair;
      pair.set(0, acc[n][2 * half] * scale);
      pair.set(1, acc[n][2 * half + 1] * scale);
      if (at < d) store(target + at, pair);
    }
  }
}

}  // namespace flamingo
