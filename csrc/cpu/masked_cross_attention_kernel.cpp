// Masked cross-attention on the CPU, forward and backward; compiled once per ISA.
//
// Work is a tile (plan.h): up to 64 rows of q, a row being one query and one of the query heads that share a key head,
// against the hull of the tile's intervals, 64 keys at a time, with everything in scratch memory that stays in cache.
//
// Forward, per tile and key head (online softmax over the blocks of keys):
//   S = Q Kᵀ,  P = exp(scale·S - max),  O = O·alpha + P V;   o = O / Σ P,  lse = max + log Σ P
// Backward, per component and key head (dK and dV gather in scratch; S is recomputed, transposed, from lse):
//   Sᵀ = K Qᵀ,  Pᵀ = exp(scale·Sᵀ - lse),  dSᵀ = Pᵀ ∘ (V dOᵀ - δ),  dV += Pᵀ dO,  dK += dSᵀ Q,  dQ += dS K
// With Sᵀ, the left operands K, V, Pᵀ, dSᵀ and the right ones dO, Q, K are in place; only Q, dO and dS are transposed.
// Five matmuls for each pair of tile and block. Where components are too few to fill the machine ("all" mode, one
// row), dQ is done by tile and dK, dV by block of keys, at seven matmuls.
//
// In a tile whose queries see different keys, a masked weight of 0 would turn a NaN or an infinity into NaN for queries
// that do not see it; such tiles are done query by query.

#include <memory>

#include "masked_cross_attention.h"
#include "parallel.h"
#include "tiles.h"

namespace flamingo::CPU_CAPABILITY {
namespace {

constexpr int64_t kRowStep = 4;      // rows of a matmul's inner dimension are rounded up to this
constexpr int64_t kColumnStep = 16;  // queries as columns are rounded up to this, the side of a transposed block

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

// Calls visit(tile) for each query of a tile, as a tile of its own.
template <typename Visit>
void for_each_single(const AttentionSizes& size, const Tile& tile, const int32_t* start, const int32_t* end,
                     const Visit& visit) {
  for_each_query(size, tile, [&](int64_t i, int64_t b, int64_t t) {
    const int64_t at = b * size.tokens + t;
    visit(Tile{tile.kv_row, tile.first + i, 1, start[at], end[at], true});
  });
}

int64_t contiguous_row(const AttentionSizes& size, int64_t b, int64_t t, int64_t h) {
  return ((b * size.tokens + t) * size.heads + h) * size.dim;
}

template <typename scalar_t>
const scalar_t* row_at(const void* data, const Strides& strides, int64_t b, int64_t t, int64_t h) {
  return static_cast<const scalar_t*>(data) + b * strides.row + t * strides.token + h * strides.head;
}

// Whether the rows of a tile lie at equal distances in q and o.
bool evenly_spaced(const AttentionSizes& size) { return size.rows == size.kv_rows && size.heads == size.kv_heads; }

// Sizes of a worker's tiles.
struct TileSizes {
  int64_t dim;    // D
  int64_t depth;  // D, even for VNNI: the length of a row of Q or K as a matmul's inner dimension
  int64_t rows;   // most rows of a tile, rounded up

  template <typename tile_t>
  static TileSizes of(const AttentionSizes& size) {
    const int64_t group = size.heads / size.kv_heads;
    const int64_t rows = std::max(kTileRows, group);
    return {size.dim, round_up(size.dim, is_vnni<tile_t> ? 2 : 1), round_up(rows, kColumnStep)};
  }
};

// ---- forward --------------------------------------------------------------------------------------------------------

template <typename scalar_t, typename tile_t>
class ForwardWorker {
  using acc_t = accumulate_t<tile_t>;
  static constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();

 public:
  explicit ForwardWorker(const ForwardArgs& args)
      : args_(args), size_(args.size), sizes_(TileSizes::of<tile_t>(size_)) {
    carve();
    arena_.allocate();
    carve();
  }
  ~ForwardWorker() { release_matmul<tile_t>(); }

  void operator()(const Tile& tile, int64_t g) {
    if (!tile.uniform && values_poisoned(tile, g)) {
      for_each_single(size_, tile, args_.start, args_.end, [&](const Tile& single) { attend(single, g); });
    } else {
      attend(tile, g);
    }
  }

 private:
  void carve() {
    q_ = arena_.take<tile_t>(sizes_.rows * sizes_.depth);
    stage_ = arena_.take<tile_t>(kBlockKeys * sizes_.depth);
    k_ = arena_.take<tile_t>(sizes_.depth * kBlockKeys);
    v_ = arena_.take<tile_t>(kBlockKeys * sizes_.dim);
    s_ = arena_.take<acc_t>(sizes_.rows * kBlockKeys);
    p_ = std::is_same_v<tile_t, acc_t> ? reinterpret_cast<tile_t*>(s_) : arena_.take<tile_t>(sizes_.rows * kBlockKeys);
    o_ = arena_.take<acc_t>(sizes_.rows * sizes_.dim);
    max_ = arena_.take<acc_t>(sizes_.rows);
    sum_ = arena_.take<acc_t>(sizes_.rows);
    lanes_ = arena_.take<acc_t>(Vec<acc_t>::size() * Vec<acc_t>::size());
    lanes_scratch_ = arena_.take<acc_t>(Vec<acc_t>::size() * Vec<acc_t>::size());
    reference_ = arena_.take<acc_t>(Vec<acc_t>::size());
    alpha_ = arena_.take<acc_t>(Vec<acc_t>::size());
  }

  bool values_poisoned(const Tile& tile, int64_t g) const {
    acc_t poison = 0;
    for (int64_t j = tile.key_begin; j < tile.key_end; ++j) {
      poison += poison_of_row<acc_t>(row_at<scalar_t>(args_.v, args_.v_strides, tile.kv_row, j, g), size_.dim);
    }
    return poison != 0;  // NaN
  }

  void attend(const Tile& tile, int64_t g) {
    const int64_t rows = tile.count * (size_.heads / size_.kv_heads);
    const auto [q, q_ld] = queries(tile, g, rows);
    std::fill_n(max_, sizes_.rows, -kInfinity);
    std::fill_n(sum_, sizes_.rows, acc_t(0));
    if (tile.key_begin == tile.key_end) std::fill_n(o_, rows * size_.dim, acc_t(0));

    acc_t* direct = memory_of_o(tile, g);
    acc_t* o = direct ? direct : o_;
    const int64_t o_ld = direct ? size_.heads * size_.dim : size_.dim;
    for (int64_t j = tile.key_begin; j < tile.key_end; j += kBlockKeys) {
      const int64_t keys = std::min(kBlockKeys, tile.key_end - j), columns = round_up(keys, kStep<acc_t>);
      const bool first = j == tile.key_begin;
      const auto* k = row_at<scalar_t>(args_.k, args_.k_strides, tile.kv_row, j, g);
      const auto* v = row_at<scalar_t>(args_.v, args_.v_strides, tile.kv_row, j, g);
      const auto [k_rows, ld] = rows_left(stage_, k, args_.k_strides.token, keys, size_.dim, sizes_.depth);
      transpose_right(k_, columns, k_rows, ld, keys, sizes_.depth, columns);
      const auto [v_rows, v_ld] = rows_right(v_, v, args_.v_strides.token, keys, size_.dim, columns);
      Ahead<scalar_t> ahead = soon(tile, g, j, keys, rows);
      matmul(rows, columns, sizes_.depth, q, q_ld, k_, columns, s_, kBlockKeys, false, ahead);
      softmax(mask(tile, j, keys, columns, rows), columns, rows, first, direct != nullptr, ahead);
      matmul(rows, size_.dim, columns, p_, kBlockKeys, v_rows, v_ld, o, o_ld, !first, ahead);
    }
    if (!direct) store_o(tile, g);
    store_lse(tile, g, rows);
  }

  // The rows of Q: the memory itself where it has the form of a left operand, else a copy.
  std::pair<const tile_t*, int64_t> queries(const Tile& tile, int64_t g, int64_t rows) {
    if (evenly_spaced(size_)) {
      const auto* q = row_at<scalar_t>(args_.q, args_.q_strides, tile.kv_row, tile.first, g);
      return rows_left(q_, q, args_.q_strides.token, rows, size_.dim, sizes_.depth);
    }
    for_each_row(size_, tile, g, [&](int64_t r, int64_t b, int64_t t, int64_t h) {
      copy_row(q_ + r * sizes_.depth, row_at<scalar_t>(args_.q, args_.q_strides, b, t, h), size_.dim, sizes_.depth);
    });
    return {q_, sizes_.depth};
  }

  // Where the matmul P V can write o itself: one block of keys, so that P is divided by its sum beforehand.
  acc_t* memory_of_o(const Tile& tile, int64_t g) const {
    const int64_t keys = tile.key_end - tile.key_begin;
    if (!std::is_same_v<scalar_t, acc_t> || !evenly_spaced(size_) || keys == 0 || keys > kBlockKeys) return nullptr;
    if (size_.heads * size_.dim > kMostLeading) return nullptr;
    return static_cast<acc_t*>(args_.o) + contiguous_row(size_, tile.kv_row, tile.first, g);
  }

  // What this head of the tile will write and the next one read. Slices: rows of S, of P and of O.
  Ahead<scalar_t> soon(const Tile& tile, int64_t g, int64_t j, int64_t keys, int64_t rows) const {
    Ahead<scalar_t> ahead(3 * rows, size_.dim);
    const bool with_queries = j + kBlockKeys >= tile.key_end && evenly_spaced(size_);
    if (with_queries) {
      const int64_t at = contiguous_row(size_, tile.kv_row, tile.first, g);
      ahead.add(static_cast<const scalar_t*>(args_.o) + at, size_.heads * size_.dim, tile.count, /*write=*/true);
    }
    if (g + 1 == size_.kv_heads) return ahead;
    const auto add = [&](const void* data, const Strides& strides, int64_t first, int64_t count) {
      ahead.add(row_at<scalar_t>(data, strides, tile.kv_row, first, g + 1), strides.token, count);
    };
    add(args_.k, args_.k_strides, j, keys);
    add(args_.v, args_.v_strides, j, keys);
    if (with_queries) add(args_.q, args_.q_strides, tile.first, tile.count);
    return ahead;
  }

  // Where some score is masked: S = scale·S, -inf where a query does not see a key and in the columns past the keys.
  // Returns the scale that is left to apply.
  acc_t mask(const Tile& tile, int64_t j, int64_t keys, int64_t columns, int64_t rows) {
    const acc_t scale = static_cast<acc_t>(args_.softmax_scale);
    if (tile.uniform && keys == columns) return scale;
    for (int64_t r = 0; r < rows; ++r) {
      acc_t* s = s_ + r * kBlockKeys;
      scale_row(s, s, keys, scale);
      std::fill(s + keys, s + columns, -kInfinity);
    }
    if (tile.uniform) return 1;
    const int64_t group = size_.heads / size_.kv_heads;
    for_each_query(size_, tile, [&](int64_t i, int64_t b, int64_t t) {
      const int64_t at = b * size_.tokens + t;
      const int64_t from = std::clamp<int64_t>(args_.start[at] - j, 0, keys);
      const int64_t to = std::clamp<int64_t>(args_.end[at] - j, from, keys);
      for (int64_t r = i * group; r < (i + 1) * group; ++r) {
        std::fill(s_ + r * kBlockKeys, s_ + r * kBlockKeys + from, -kInfinity);
        std::fill(s_ + r * kBlockKeys + to, s_ + r * kBlockKeys + keys, -kInfinity);
      }
    });
    return 1;
  }

  // P = exp(scale·S - max) for a block of keys; brings max, sum and O up to date. As many rows at a time as a vector
  // has lanes, so that their maxima and sums are vectors.
  void softmax(acc_t scale_left, int64_t columns, int64_t rows, bool first, bool divide, Ahead<scalar_t>& ahead) {
    using V = Vec<acc_t>;
    const V scale(scale_left), zero(0), nothing(-kInfinity);
    for (int64_t top = 0; top < rows; top += V::size()) {
      const int64_t count = std::min<int64_t>(V::size(), rows - top);
      for (int64_t i = 0; i < count; ++i) {
        const acc_t* s = s_ + (top + i) * kBlockKeys;
        V largest = V::loadu(s) * scale;
        // Whether or not a NaN wins here, exp carries it into P and the sum.
        for (int64_t c = V::size(); c < columns; c += V::size()) largest = larger(largest, V::loadu(s + c) * scale);
        largest.store(lanes_ + i * V::size());
      }
      const V before = V::loadu(max_ + top);
      const V now = larger(before, reduce_each(lanes_, lanes_scratch_, larger<acc_t>));
      const V reference = V::blendv(now, zero, now == nothing);  // nothing visible yet: exp(-inf - 0) = 0
      now.store(max_ + top);
      reference.store(reference_);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (top + i) * kBlockKeys;
        const V shift(reference_[i]);
        V total(0);
        for (int64_t c = 0; c < columns; c += kStep<acc_t>) {
          // Not one fused operation: S·scale must be rounded as for the maximum, or large scores would exceed it.
          const V a = exp(V::loadu(s_ + at + c) * scale - shift);
          const V b = exp(V::loadu(s_ + at + c + V::size()) * scale - shift);
          total = total + (a + b);
          store_step(p_ + at + c, a, b);
        }
        total.store(lanes_ + i * V::size());
        if (i % kRowStep == 0) ahead.fetch(kRowStep);
      }
      const V alpha = exp(before - reference);
      const V sums = reduce_each(lanes_, lanes_scratch_, [](V a, V b) { return a + b; });
      at::vec::fmadd(V::loadu(sum_ + top), alpha, sums).store(sum_ + top);
      if constexpr (std::is_same_v<tile_t, acc_t>) {
        for (int64_t i = 0; divide && i < count; ++i) {
          tile_t* p = p_ + (top + i) * kBlockKeys;
          scale_row(p, p, columns, inverse_of_sum(top + i));
        }
      }
      if (first) continue;
      alpha.store(alpha_);
      for (int64_t i = 0; i < count; ++i) {
        acc_t* o = o_ + (top + i) * size_.dim;
        if (alpha_[i] != acc_t(1)) scale_row(o, o, size_.dim, alpha_[i]);
      }
    }
  }

  acc_t inverse_of_sum(int64_t r) const { return sum_[r] == acc_t(0) ? acc_t(0) : acc_t(1) / sum_[r]; }

  void store_o(const Tile& tile, int64_t g) {
    for_each_row(size_, tile, g, [&](int64_t r, int64_t b, int64_t t, int64_t h) {
      scale_row(static_cast<scalar_t*>(args_.o) + contiguous_row(size_, b, t, h), o_ + r * size_.dim, size_.dim,
                inverse_of_sum(r));
    });
  }

  void store_lse(const Tile& tile, int64_t g, int64_t rows) {
    using V = Vec<acc_t>;
    for (int64_t r = 0; r < rows; r += V::size()) (V::loadu(max_ + r) + V::loadu(sum_ + r).log()).store(sum_ + r);
    for_each_row(size_, tile, g, [&](int64_t r, int64_t b, int64_t t, int64_t h) {
      static_cast<acc_t*>(args_.lse)[(b * size_.heads + h) * size_.tokens + t] = sum_[r];
    });
  }

  const ForwardArgs& args_;
  const AttentionSizes& size_;
  const TileSizes sizes_;
  Arena arena_;
  tile_t *q_, *stage_, *k_, *v_, *p_;  // [rows, depth], [64, depth], [depth, 64], [64, D], [rows, 64]
  acc_t *s_, *o_, *max_, *sum_;        // [rows, 64], [rows, D], [rows], [rows]
  acc_t *lanes_, *lanes_scratch_;      // a vector for each of a vector's lanes
  acc_t *reference_, *alpha_;          // a vector
};

// ---- backward -------------------------------------------------------------------------------------------------------

template <typename scalar_t, typename tile_t>
class BackwardWorker {
  using acc_t = accumulate_t<tile_t>;

 public:
  BackwardWorker(const BackwardArgs& args, int64_t most_keys)
      : args_(args), size_(args.size), sizes_(TileSizes::of<tile_t>(size_)), most_keys_(most_keys) {
    carve();
    arena_.allocate();
    carve();
  }
  ~BackwardWorker() { release_matmul<tile_t>(); }

  // `next` is the item that this worker does after this one, or null.
  void operator()(const BackwardItem& item, const BackwardItem* next) {
    Ahead<scalar_t> ahead = soon(item, next);
    if (item.want_dkv) {
      std::fill_n(dk_, (item.key_end - item.key_begin) * size_.dim, acc_t(0));
      std::fill_n(dv_, (item.key_end - item.key_begin) * size_.dim, acc_t(0));
    }
    for (int64_t i = item.tile_begin; i < item.tile_end; ++i) {
      const Tile& tile = args_.plan->tiles[i];
      if (!item.want_dq && (tile.key_end <= item.key_begin || item.key_end <= tile.key_begin)) continue;
      if (!tile.uniform && poisoned(tile, item.kv_head)) {
        for_each_single(size_, tile, args_.start, args_.end,
                        [&](const Tile& single) { differentiate(single, item, ahead); });
      } else {
        differentiate(tile, item, ahead);
      }
    }
    if (item.want_dkv) finish_dkv(item);
  }

 private:
  void carve() {
    const int64_t rows = sizes_.rows;
    qt_ = arena_.take<tile_t>(sizes_.depth * rows);
    dot_ = arena_.take<tile_t>(sizes_.depth * rows);
    q_ = arena_.take<tile_t>(rows * size_.dim);
    do_ = arena_.take<tile_t>(rows * size_.dim);
    rows_ = arena_.take<tile_t>(std::max(rows, kBlockKeys) * sizes_.depth);
    v_rows_ = arena_.take<tile_t>(kBlockKeys * sizes_.depth);
    k_ = arena_.take<tile_t>(kBlockKeys * size_.dim);
    st_ = arena_.take<acc_t>(kBlockKeys * rows);
    dpt_ = arena_.take<acc_t>(kBlockKeys * rows);
    pt_ = std::is_same_v<tile_t, acc_t> ? reinterpret_cast<tile_t*>(st_) : arena_.take<tile_t>(kBlockKeys * rows);
    dst_ = std::is_same_v<tile_t, acc_t> ? reinterpret_cast<tile_t*>(dpt_) : arena_.take<tile_t>(kBlockKeys * rows);
    ds_ = arena_.take<tile_t>(rows * kBlockKeys);
    dq_ = arena_.take<acc_t>(rows * size_.dim);
    lse_ = arena_.take<acc_t>(rows);
    delta_ = arena_.take<acc_t>(rows);
    from_ = arena_.take<acc_t>(rows);
    to_ = arena_.take<acc_t>(rows);
    dk_ = arena_.take<acc_t>(most_keys_ * size_.dim);
    dv_ = arena_.take<acc_t>(most_keys_ * size_.dim);
  }

  bool poisoned(const Tile& tile, int64_t g) const {
    acc_t poison = 0;
    for (int64_t j = tile.key_begin; j < tile.key_end; ++j) {
      poison += poison_of_row<acc_t>(row_at<scalar_t>(args_.k, args_.k_strides, tile.kv_row, j, g), size_.dim);
    }
    for_each_row(size_, tile, g, [&](int64_t, int64_t b, int64_t t, int64_t h) {
      poison += poison_of_row<acc_t>(row_at<scalar_t>(args_.q, args_.q_strides, b, t, h), size_.dim);
      poison += poison_of_row<acc_t>(row_at<scalar_t>(args_.d_out, args_.d_out_strides, b, t, h), size_.dim);
    });
    return poison != 0;  // NaN
  }

  // What the item will write and the next one read, of its first tile and block. Slices: rows of the block's six
  // stages.
  Ahead<scalar_t> soon(const BackwardItem& item, const BackwardItem* next) const {
    Ahead<scalar_t> ahead(6 * kBlockKeys, size_.dim);
    if (!evenly_spaced(size_)) return ahead;
    const int64_t ld = size_.heads * size_.dim;
    if (item.want_dq && item.tile_begin < item.tile_end) {
      const Tile& tile = args_.plan->tiles[item.tile_begin];
      const int64_t at = contiguous_row(size_, tile.kv_row, tile.first, item.kv_head);
      ahead.add(static_cast<const scalar_t*>(args_.dq) + at, ld, tile.count, /*write=*/true);
    }
    if (item.want_dkv) {
      const int64_t at = contiguous_key(item, item.key_begin),
                    keys = std::min(kBlockKeys, item.key_end - item.key_begin);
      ahead.add(static_cast<const scalar_t*>(args_.dk) + at, ld, keys, /*write=*/true);
      ahead.add(static_cast<const scalar_t*>(args_.dv) + at, ld, keys, /*write=*/true);
    }
    if (!next || next->tile_begin == next->tile_end) return ahead;
    const Tile& tile = args_.plan->tiles[next->tile_begin];
    const int64_t keys = std::min(kBlockKeys, tile.key_end - tile.key_begin);
    const auto add = [&](const void* data, const Strides& strides, int64_t first, int64_t count) {
      ahead.add(row_at<scalar_t>(data, strides, tile.kv_row, first, next->kv_head), strides.token, count);
    };
    add(args_.q, args_.q_strides, tile.first, tile.count);
    add(args_.d_out, args_.d_out_strides, tile.first, tile.count);
    add(args_.o, {size_.tokens * ld, ld, size_.dim}, tile.first, tile.count);
    add(args_.k, args_.k_strides, tile.key_begin, keys);
    add(args_.v, args_.v_strides, tile.key_begin, keys);
    return ahead;
  }

  int64_t contiguous_key(const BackwardItem& item, int64_t j) const {
    return ((item.kv_row * size_.keys + j) * size_.kv_heads + item.kv_head) * size_.dim;
  }

  void differentiate(const Tile& tile, const BackwardItem& item, Ahead<scalar_t>& ahead) {
    const int64_t rows = tile.count * (size_.heads / size_.kv_heads);
    load_queries(tile, item.kv_head, rows);
    if (item.want_dq && tile.key_begin == tile.key_end) std::fill_n(dq_, rows * size_.dim, acc_t(0));
    const int64_t key_begin = std::max(tile.key_begin, item.key_begin);
    const int64_t key_end = std::min(tile.key_end, item.key_end);
    for (int64_t j = key_begin; j < key_end;) {
      const int64_t next = item.first_key + ((j - item.first_key) / kBlockKeys + 1) * kBlockKeys;
      const int64_t keys = std::min(next, key_end) - j;
      differentiate_block(tile, item, rows, j, keys, j == tile.key_begin, ahead);
      j += keys;
    }
    if (!item.want_dq) return;
    for_each_row(size_, tile, item.kv_head, [&](int64_t r, int64_t b, int64_t t, int64_t h) {
      scale_row(static_cast<scalar_t*>(args_.dq) + contiguous_row(size_, b, t, h), dq_ + r * size_.dim, size_.dim,
                static_cast<acc_t>(args_.softmax_scale));
    });
  }

  // Q and dO as right operands, straight and transposed; lse and δ = ⟨dO, O⟩ of each row.
  void load_queries(const Tile& tile, int64_t g, int64_t rows) {
    const int64_t columns = round_up(rows, kColumnStep);
    load_query_side(args_.q, args_.q_strides, tile, g, rows, columns, qt_, q_);
    load_query_side(args_.d_out, args_.d_out_strides, tile, g, rows, columns, dot_, do_);
    for_each_row(size_, tile, g, [&](int64_t r, int64_t b, int64_t t, int64_t h) {
      lse_[r] = static_cast<const acc_t*>(args_.lse)[(b * size_.heads + h) * size_.tokens + t];
      delta_[r] = dot_row<acc_t>(row_at<scalar_t>(args_.d_out, args_.d_out_strides, b, t, h),
                                 static_cast<const scalar_t*>(args_.o) + contiguous_row(size_, b, t, h), size_.dim);
    });
    // The columns past the rows hold S = 0: P = exp(0 - inf) = 0.
    std::fill(lse_ + rows, lse_ + columns, std::numeric_limits<acc_t>::infinity());
    std::fill(delta_ + rows, delta_ + columns, acc_t(0));
  }

  void load_query_side(const void* data, const Strides& strides, const Tile& tile, int64_t g, int64_t rows,
                       int64_t columns, tile_t* transposed, tile_t* straight) {
    tile_t* loaded = is_vnni<tile_t> ? rows_ : straight;
    for_each_row(size_, tile, g, [&](int64_t r, int64_t b, int64_t t, int64_t h) {
      copy_row(loaded + r * sizes_.depth, row_at<scalar_t>(data, strides, b, t, h), size_.dim, sizes_.depth);
    });
    std::fill(loaded + rows * sizes_.depth, loaded + columns * sizes_.depth, tile_t(0));
    transpose_right(transposed, columns, loaded, sizes_.depth, columns, sizes_.depth, columns);
    if constexpr (is_vnni<tile_t>) rows_right(straight, loaded, sizes_.depth, columns, size_.dim, columns);
  }

  void differentiate_block(const Tile& tile, const BackwardItem& item, int64_t rows, int64_t j, int64_t keys,
                           bool first, Ahead<scalar_t>& ahead) {
    const int64_t columns = round_up(rows, kColumnStep), inner = round_up(rows, kRowStep);
    const int64_t ld = sizes_.rows;
    const auto* k = row_at<scalar_t>(args_.k, args_.k_strides, tile.kv_row, j, item.kv_head);
    const auto* v = row_at<scalar_t>(args_.v, args_.v_strides, tile.kv_row, j, item.kv_head);
    const auto [k_rows, k_ld] = rows_left(rows_, k, args_.k_strides.token, keys, size_.dim, sizes_.depth);
    matmul(keys, columns, sizes_.depth, k_rows, k_ld, qt_, columns, st_, ld, false, ahead);
    const auto [v_rows, v_ld] = rows_left(v_rows_, v, args_.v_strides.token, keys, size_.dim, sizes_.depth);
    matmul(keys, columns, sizes_.depth, v_rows, v_ld, dot_, columns, dpt_, ld, false, ahead);
    scores_gradient(tile, j, keys, columns, ahead);
    if (item.want_dkv) {
      const int64_t at = (j - item.key_begin) * size_.dim;
      matmul(keys, size_.dim, inner, pt_, ld, do_, size_.dim, dv_ + at, size_.dim, true, ahead);
      matmul(keys, size_.dim, inner, dst_, ld, q_, size_.dim, dk_ + at, size_.dim, true, ahead);
    }
    if (item.want_dq) {
      const int64_t inner_keys = is_vnni<tile_t> ? round_up(keys, 2) : keys;
      const auto [k_right, k_right_ld] = rows_right(k_, k, args_.k_strides.token, keys, size_.dim, inner_keys);
      transpose_blocks<kColumnStep>(ds_, kBlockKeys, dst_, ld, keys, columns, inner_keys);
      matmul(rows, size_.dim, inner_keys, ds_, kBlockKeys, k_right, k_right_ld, dq_, size_.dim, !first, ahead);
    }
  }

  // Pᵀ = exp(scale·Sᵀ - lse) and dSᵀ = Pᵀ ∘ (dPᵀ - δ), 0 where the query of the column does not see the key of the row.
  void scores_gradient(const Tile& tile, int64_t j, int64_t keys, int64_t columns, Ahead<scalar_t>& ahead) {
    using V = Vec<acc_t>;
    const int64_t ld = sizes_.rows;
    const V scale(static_cast<acc_t>(args_.softmax_scale)), zero(0);
    if (!tile.uniform) load_windows(tile, j, keys, columns);
    for (int64_t i = 0; i < keys; ++i) {
      const acc_t *s = st_ + i * ld, *dp = dpt_ + i * ld;
      const V key(static_cast<acc_t>(i));
      const auto gradient = [&](int64_t c, V& p, V& ds) {
        p = exp(at::vec::clamp_max(V::loadu(s + c) * scale - V::loadu(lse_ + c), zero));
        ds = p * (V::loadu(dp + c) - V::loadu(delta_ + c));
        if (!tile.uniform) {
          const V sees = (key >= V::loadu(from_ + c)) & (key < V::loadu(to_ + c));
          p = V::blendv(zero, p, sees);
          ds = V::blendv(zero, ds, sees);
        }
      };
      V p, ds, p_next, ds_next;
      int64_t c = 0;
      for (; c + kStep<acc_t> <= columns; c += kStep<acc_t>) {
        gradient(c, p, ds);
        gradient(c + V::size(), p_next, ds_next);
        store_step(pt_ + i * ld + c, p, p_next);
        store_step(dst_ + i * ld + c, ds, ds_next);
      }
      if (c < columns) {  // half a step
        gradient(c, p, ds);
        store_half_step(pt_ + i * ld + c, p);
        store_half_step(dst_ + i * ld + c, ds);
      }
      ahead.fetch(1);
    }
  }

  // Which keys of a block each column sees: from_ <= i < to_.
  void load_windows(const Tile& tile, int64_t j, int64_t keys, int64_t columns) {
    const int64_t group = size_.heads / size_.kv_heads;
    for_each_query(size_, tile, [&](int64_t i, int64_t b, int64_t t) {
      const int64_t at = b * size_.tokens + t;
      std::fill_n(from_ + i * group, group, static_cast<acc_t>(std::clamp<int64_t>(args_.start[at] - j, 0, keys)));
      std::fill_n(to_ + i * group, group, static_cast<acc_t>(std::clamp<int64_t>(args_.end[at] - j, 0, keys)));
    });
    std::fill(from_ + tile.count * group, from_ + columns, acc_t(0));
    std::fill(to_ + tile.count * group, to_ + columns, acc_t(0));
  }

  void finish_dkv(const BackwardItem& item) {
    for (int64_t j = item.key_begin; j < item.key_end; ++j) {
      const int64_t from = (j - item.key_begin) * size_.dim;
      const int64_t to = contiguous_key(item, j);
      scale_row(static_cast<scalar_t*>(args_.dk) + to, dk_ + from, size_.dim, static_cast<acc_t>(args_.softmax_scale));
      scale_row(static_cast<scalar_t*>(args_.dv) + to, dv_ + from, size_.dim, acc_t(1));
    }
  }

  const BackwardArgs& args_;
  const AttentionSizes& size_;
  const TileSizes sizes_;
  const int64_t most_keys_;
  Arena arena_;
  tile_t *qt_, *dot_;                  // right operands [depth, rows]
  tile_t *q_, *do_;                    // right operands [rows, D]
  tile_t *rows_, *v_rows_, *k_;        // [max(rows, 64), depth], [64, depth], right operand [64, D]
  tile_t *pt_, *dst_, *ds_;            // [64, rows], [64, rows], [rows, 64]
  acc_t *st_, *dpt_, *dq_;             // [64, rows], [64, rows], [rows, D]
  acc_t *lse_, *delta_, *from_, *to_;  // [rows]
  acc_t *dk_, *dv_;                    // [most_keys, D]
};

// ---- dispatch -------------------------------------------------------------------------------------------------------

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

int64_t useful_threads(double cost, const AttentionSizes& size) {
  // Waking a thread costs about what 64 rows of one block do.
  return 1 + static_cast<int64_t>(cost * size.kv_heads * size.dim / (64 * 64));
}

void forward(c10::ScalarType dtype, bool narrow_tiles, const ForwardArgs& args) {
  const int64_t tiles = static_cast<int64_t>(args.plan->tiles.size()), heads = args.size.kv_heads;
  // Heads of a tile lie side by side in memory, so an item takes as many as leave enough items to share out evenly.
  const int64_t parts = std::clamp<int64_t>(16 * at::get_num_threads() / tiles, 1, heads);
  const int64_t heads_each = (heads + parts - 1) / parts;
  const int64_t threads = useful_threads(args.plan->cost(), args.size);
  for_types(dtype, narrow_tiles, [&]<typename scalar_t, typename tile_t>() {
    for_each_item(tiles * parts, threads, [&] {
      return [&, worker = std::make_unique<ForwardWorker<scalar_t, tile_t>>(args)](int64_t item) {
        const int64_t first = item % parts * heads_each;
        for (int64_t g = first; g < std::min(first + heads_each, heads); ++g)
          (*worker)(args.plan->tiles[item / parts], g);
      };
    });
  });
}

void backward(c10::ScalarType dtype, bool narrow_tiles, const BackwardArgs& args) {
  const BackwardItems items = backward_items(*args.plan, args.size.kv_heads, at::get_num_threads());
  const BackwardItem* list = items.list.data();
  // As in forward: neighbours in the list are heads of one component.
  const int64_t count = static_cast<int64_t>(items.list.size());
  const int64_t each = std::clamp<int64_t>(count / (16 * at::get_num_threads()), 1, args.size.kv_heads);
  const int64_t threads = useful_threads(args.plan->cost(), args.size);
  for_types(dtype, narrow_tiles, [&]<typename scalar_t, typename tile_t>() {
    for_each_item((count + each - 1) / each, threads, [&] {
      return [&, worker = std::make_unique<BackwardWorker<scalar_t, tile_t>>(args, items.most_keys)](int64_t part) {
        const int64_t stop = std::min((part + 1) * each, count);
        for (int64_t i = part * each; i < stop; ++i) (*worker)(list[i], i + 1 < stop ? list + i + 1 : nullptr);
      };
    });
  });
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {forward, backward};

}  // namespace flamingo::CPU_CAPABILITY
