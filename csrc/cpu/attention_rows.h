// What the forward and backward kernels of attention share: the rows of a tile, its keys, and the choice of types.
//
// A tile (plan.h) is up to 128 rows of q, a row being one query and one of the query heads that share a key head,
// against the hull of the tile's intervals, 64 keys at a time, with everything in scratch memory that stays in cache.
//
// In a tile whose queries see different keys, a masked weight of 0 would turn a NaN or an infinity into NaN for queries
// that do not see it; such tiles are done query by query (for_each_single).
#pragma once

#include "attention.h"
#include "tiles.h"

namespace flamingo::CPU_CAPABILITY {

constexpr int64_t kRowStep = 4;  // rows of a matmul's inner dimension are rounded up to this

// Calls visit(i, b, t) for the queries of a tile, in order.
template <typename Visit>
void for_each_query(const AttentionSizes& size, const Tile& tile, const Visit& visit) {
  const int64_t index = tile.kv_row * (size.rows / size.kv_rows) * size.tokens + tile.first;
  int64_t b = index / size.tokens, t = index % size.tokens;
  for (int64_t i = 0; i < tile.count; ++i) {
    visit(i, b, t);
    if (++t == size.tokens) t = 0, ++b;
  }
}

// Row r of a tile is query r / group and head g·group + r % group; calls visit(r, b, t, h).
template <typename Visit>
void for_each_row(const AttentionSizes& size, const Tile& tile, int64_t g, const Visit& visit) {
  const int64_t group = size.heads / size.kv_heads;
  for_each_query(size, tile, [&](int64_t i, int64_t b, int64_t t) {
    for (int64_t r = 0; r < group; ++r) visit(i * group + r, b, t, g * group + r);
  });
}

// Calls visit(tile) for each query of a tile, as a tile of its own on those of the tile's keys that the query sees.
template <typename Visit>
void for_each_single(const AttentionArgs& args, const Tile& tile, const Visit& visit) {
  for_each_query(args.size, tile, [&](int64_t i, int64_t b, int64_t t) {
    const int64_t at = b * args.size.tokens + t;
    const int64_t begin = std::clamp<int64_t>(args.start[at], tile.key_begin, tile.key_end);
    const int64_t end = std::clamp<int64_t>(args.end[at], begin, tile.key_end);
    visit(Tile{tile.kv_row, tile.first + i, 1, begin, end, true});
  });
}

inline int64_t contiguous_row(const AttentionSizes& size, int64_t b, int64_t t, int64_t h) {
  return ((b * size.tokens + t) * size.heads + h) * size.dim;
}

template <typename scalar_t>
const scalar_t* row_at(const void* data, const Strides& strides, int64_t b, int64_t t, int64_t h) {
  return static_cast<const scalar_t*>(data) + b * strides.row + t * strides.token + h * strides.head;
}

// The source of key j.
inline const KeySource& source_of(const AttentionArgs& args, int64_t j) {
  return args.sources[j < args.plan->border ? 0 : 1];
}

// Key j of a row and head, and the keys behind it up to the end of its block.
template <typename scalar_t>
const scalar_t* key_at(const KeySource& source, int64_t kv_row, int64_t j, int64_t g) {
  return row_at<scalar_t>(source.k, source.k_strides, kv_row, j - source.first, g);
}
template <typename scalar_t>
const scalar_t* value_at(const KeySource& source, int64_t kv_row, int64_t j, int64_t g) {
  return row_at<scalar_t>(source.v, source.v_strides, kv_row, j - source.first, g);
}

// Whether the rows of a tile lie at equal distances in q and o.
inline bool evenly_spaced(const AttentionSizes& size) {
  return size.rows == size.kv_rows && size.heads == size.kv_heads;
}

// Sizes of a worker's tiles.
struct TileSizes {
  int64_t dim;    // D
  int64_t depth;  // D, even for VNNI: the length of a row of Q or K as a matmul's inner dimension
  int64_t rows;   // most rows of a tile, rounded up

  template <typename tile_t>
  static TileSizes of(const AttentionSizes& size) {
    const int64_t group = size.heads / size.kv_heads;
    const int64_t rows = std::max(kTileRows, group);
    return {size.dim, round_up(size.dim, is_vnni<tile_t> ? 2 : 1), round_up(rows, kRowsStep)};
  }
};

template <typename Run>
void for_types(c10::ScalarType dtype, bool narrow_tiles, const Run& run) {
  switch (dtype) {
    case at::kFloat:
      return run.template operator()<float, float>();
    case at::kDouble:
      return run.template operator()<double, double>();
    case at::kHalf:  // fp16 matmuls on CPUs without AMX are many times slower than fp32 ones
      return run.template operator()<at::Half, float>();
    default:
#if defined(CPU_CAPABILITY_AVX512)
      if (narrow_tiles) return run.template operator()<at::BFloat16, at::BFloat16>();
#endif
      return run.template operator()<at::BFloat16, float>();
  }
}

inline int64_t useful_threads(double cost, const AttentionSizes& size) {
  // Waking a thread costs about what 64 rows of one block do.
  return 1 + static_cast<int64_t>(cost * size.kv_heads * size.dim / (64 * 64));
}

}  // namespace flamingo::CPU_CAPABILITY
