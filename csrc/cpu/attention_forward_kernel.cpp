// Forward of attention on the CPU; compiled once per ISA. Per tile and key head, an online softmax over the blocks of
// keys:
//
//   S = Q Kᵀ,  P = exp(scale·S - max),  O = O·alpha + P V;   o = O / Σ P,  lse = max + log Σ P
//
// Where tiles are few their keys are split into parts (plan.h), each with an O, max and Σ P of its own. Whoever
// finishes the last part of a tile adds them up, in their order.

#include <atomic>
#include <memory>
#include <vector>

#include "attention_rows.h"
#include "parallel.h"

namespace flamingo::CPU_CAPABILITY {
namespace {

// What one part of a tile's keys gives: O [rows, D], max and Σ P [rows] of a head. Null for a tile that is not split.
template <typename acc_t>
struct Partial {
  acc_t *o, *max, *sum;
};

// The results of all parts, and how many parts of each tile and head are done.
template <typename acc_t>
class Partials {
 public:
  Partials(const ForwardItems& items, const AttentionArgs& args)
      : rows_(items.partial_rows), heads_(args.size.kv_heads), dim_(args.size.dim) {
    if (rows_ == 0) return;
    carve();
    arena_.allocate();
    carve();
    std::fill_n(max_, 2 * heads_ * rows_, acc_t(0));  // rows that round up are read too
    done_ = std::vector<std::atomic<int64_t>>(args.plan->tiles.size() * heads_);
  }

  Partial<acc_t> at(int64_t row, int64_t g) const {
    const int64_t i = g * rows_ + row;
    return {o_ + i * dim_, max_ + i, max_ + heads_ * rows_ + i};
  }

  // To be called after each part; whether it is the last one.
  bool finish(const ForwardItem& item, int64_t g) {
    return done_[item.tile * heads_ + g].fetch_add(1, std::memory_order_acq_rel) + 1 == item.parts;
  }

 private:
  void carve() {
    o_ = arena_.take<acc_t>(heads_ * rows_ * dim_);
    max_ = arena_.take<acc_t>(2 * heads_ * rows_);
  }

  const int64_t rows_, heads_, dim_;
  Arena arena_;
  acc_t *o_, *max_;
  std::vector<std::atomic<int64_t>> done_;
};

template <typename scalar_t, typename tile_t>
class ForwardWorker {
  using acc_t = accumulate_t<tile_t>;
  static constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();

 public:
  ForwardWorker(const ForwardArgs& args, Partials<acc_t>& partials)
      : args_(args), plan_(*args.plan), size_(args.size), sizes_(TileSizes::of<tile_t>(size_)), partials_(partials) {
    carve();
    arena_.allocate();
    carve();
  }
  ~ForwardWorker() { release_matmul<tile_t>(); }

  // `next`, with head `next_g`, is what this worker does after this, or null.
  void operator()(const ForwardItem& item, int64_t g, const ForwardItem* next, int64_t next_g) {
    next_ = next;
    next_g_ = next_g;
    Tile tile = plan_.tiles[item.tile];
    tile.key_begin = item.key_begin;
    tile.key_end = item.key_end;
    const bool split = item.parts > 1;
    const Partial<acc_t> partial = split ? partials_.at(item.partial_row, g) : Partial<acc_t>{};
    if (!tile.uniform && values_poisoned(tile, g)) {
      const int64_t group = size_.heads / size_.kv_heads;
      for_each_single(args_, tile, [&](const Tile& single) {
        const int64_t row = (single.first - tile.first) * group;
        attend(single, g, split ? partials_.at(item.partial_row + row, g) : partial);
      });
    } else {
      attend(tile, g, partial);
    }
    if (split && partials_.finish(item, g)) add_up(item, tile, g);
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
      poison += poison_of_row<acc_t>(value_at<scalar_t>(source_of(args_, j), tile.kv_row, j, g), size_.dim);
    }
    return poison != 0;  // NaN
  }

  void attend(const Tile& tile, int64_t g, const Partial<acc_t>& partial) {
    const int64_t rows = tile.count * (size_.heads / size_.kv_heads);
    const auto [q, q_ld] = queries(tile, g, rows);
    std::fill_n(max_, sizes_.rows, -kInfinity);
    std::fill_n(sum_, sizes_.rows, acc_t(0));

    acc_t* direct = partial.o ? nullptr : memory_of_o(tile, g);
    acc_t* o = direct ? direct : partial.o ? partial.o : o_;
    const int64_t o_ld = direct ? size_.heads * size_.dim : size_.dim;
    if (tile.key_begin == tile.key_end) std::fill_n(o, rows * size_.dim, acc_t(0));
    for (int64_t j = tile.key_begin, next; j < tile.key_end; j = next) {
      next = plan_.block_end(tile.key_begin, j, tile.key_end);
      const int64_t keys = next - j, columns = round_up(keys, kStep<acc_t>);
      const bool first = j == tile.key_begin;
      const KeySource& source = source_of(args_, j);
      const auto* k = key_at<scalar_t>(source, tile.kv_row, j, g);
      const auto* v = value_at<scalar_t>(source, tile.kv_row, j, g);
      const auto [k_rows, ld] = rows_left(stage_, k, source.k_strides.token, keys, size_.dim, sizes_.depth);
      transpose_right(k_, columns, k_rows, ld, keys, sizes_.depth, columns);
      const auto [v_rows, v_ld] = rows_right(v_, v, source.v_strides.token, keys, size_.dim, columns);
      Ahead<scalar_t> ahead = soon(tile, g, next, rows, partial.o != nullptr);
      matmul(rows, columns, sizes_.depth, q, q_ld, k_, columns, s_, kBlockKeys, false, ahead);
      softmax(mask(tile, j, keys, columns, rows), columns, rows, first ? nullptr : o, direct != nullptr, ahead);
      matmul(rows, size_.dim, columns, p_, kBlockKeys, v_rows, v_ld, o, o_ld, !first, ahead);
    }
    if (partial.o) {
      std::copy_n(max_, rows, partial.max);
      std::copy_n(sum_, rows, partial.sum);
      return;
    }
    if (!direct) store_o(tile, g);
    store_lse(tile, g, rows);
  }

  // o and lse of a tile from those of its parts: with w = exp(max of the part - max of all), O = Σ w·O, Σ P = Σ w·Σ P.
  void add_up(const ForwardItem& item, const Tile& tile, int64_t g) {
    using V = Vec<acc_t>;
    const V zero(0), nothing(-kInfinity);
    const int64_t rows = tile.count * (size_.heads / size_.kv_heads), each = round_up(rows, kRowsStep);
    for (int64_t r = 0; r < rows; r += V::size()) {
      V largest = nothing, total(0);
      for (int64_t i = 0; i < item.parts; ++i) {
        largest = larger(largest, V::loadu(partials_.at(item.first_partial_row + i * each + r, g).max));
      }
      const V reference = V::blendv(largest, zero, largest == nothing);  // nothing visible
      for (int64_t i = 0; i < item.parts; ++i) {
        const Partial<acc_t> part = partials_.at(item.first_partial_row + i * each + r, g);
        const V weight = exp(V::loadu(part.max) - reference);
        weight.store(part.max);
        total = at::vec::fmadd(V::loadu(part.sum), weight, total);
      }
      largest.store(max_ + r);
      total.store(sum_ + r);
    }
    for (int64_t r = 0; r < rows; ++r) {
      acc_t* o = o_ + r * size_.dim;
      std::fill_n(o, size_.dim, acc_t(0));
      for (int64_t i = 0; i < item.parts; ++i) {
        const Partial<acc_t> part = partials_.at(item.first_partial_row + i * each + r, g);
        add_scaled_row(o, part.o, size_.dim, *part.max);
      }
    }
    store_o(tile, g);
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
    if (!std::is_same_v<scalar_t, acc_t> || !evenly_spaced(size_) || tile.key_begin == tile.key_end) return nullptr;
    if (plan_.block_end(tile.key_begin, tile.key_begin, tile.key_end) < tile.key_end) return nullptr;
    if (size_.heads * size_.dim > kMostLeading) return nullptr;
    return static_cast<acc_t*>(args_.o) + contiguous_row(size_, tile.kv_row, tile.first, g);
  }

  // What will be read after the block that ends at `end`: the next one; after the last, what comes next reads first,
  // its queries and its first block, and what this head of the tile will write. Slices: rows of S, of P and of O.
  Ahead<scalar_t> soon(const Tile& tile, int64_t g, int64_t end, int64_t rows, bool split) const {
    Ahead<scalar_t> ahead(3 * rows, size_.dim);
    if (!evenly_spaced(size_)) return ahead;
    if (end != tile.key_end) {
      add_block(ahead, tile, end, g);
      return ahead;
    }
    if (!split) {
      const int64_t at = contiguous_row(size_, tile.kv_row, tile.first, g);
      ahead.add(static_cast<const scalar_t*>(args_.o) + at, size_.heads * size_.dim, tile.count, /*write=*/true);
    }
    if (!next_) return ahead;
    Tile next = plan_.tiles[next_->tile];
    next.key_begin = next_->key_begin;
    next.key_end = next_->key_end;
    const auto* q = row_at<scalar_t>(args_.q, args_.q_strides, next.kv_row, next.first, next_g_);
    ahead.add(q, args_.q_strides.token, next.count);
    if (next.key_begin < next.key_end) add_block(ahead, next, next.key_begin, next_g_);
    return ahead;
  }

  // The keys and values of the block that begins at j.
  void add_block(Ahead<scalar_t>& ahead, const Tile& tile, int64_t j, int64_t g) const {
    const int64_t keys = plan_.block_end(tile.key_begin, j, tile.key_end) - j;
    const KeySource& source = source_of(args_, j);
    ahead.add(key_at<scalar_t>(source, tile.kv_row, j, g), source.k_strides.token, keys);
    ahead.add(value_at<scalar_t>(source, tile.kv_row, j, g), source.v_strides.token, keys);
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

  // P = exp(scale·S - max) for a block of keys; brings max, sum and O, null for the first block, up to date. As many
  // rows at a time as a vector has lanes, so that their maxima and sums are vectors.
  void softmax(acc_t scale_left, int64_t columns, int64_t rows, acc_t* so_far, bool divide, Ahead<scalar_t>& ahead) {
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
      if (!so_far) continue;
      alpha.store(alpha_);
      for (int64_t i = 0; i < count; ++i) {
        acc_t* o = so_far + (top + i) * size_.dim;
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
  const Plan& plan_;
  const AttentionSizes& size_;
  const TileSizes sizes_;
  Partials<acc_t>& partials_;
  const ForwardItem* next_;
  int64_t next_g_;
  Arena arena_;
  tile_t *q_, *stage_, *k_, *v_, *p_;  // [rows, depth], [64, depth], [depth, 64], [64, D], [rows, 64]
  acc_t *s_, *o_, *max_, *sum_;        // [rows, 64], [rows, D], [rows], [rows]
  acc_t *lanes_, *lanes_scratch_;      // a vector for each of a vector's lanes
  acc_t *reference_, *alpha_;          // a vector
};

}  // namespace

void attention_forward(c10::ScalarType dtype, bool narrow_tiles, const ForwardArgs& args) {
  const int64_t heads = args.size.kv_heads;
  const ForwardItems items = forward_items(*args.plan, heads);
  const int64_t count = static_cast<int64_t>(items.list.size());
  // Heads of a tile lie side by side in memory, so a thread takes as many as leave enough work to share out evenly.
  const int64_t groups = std::clamp<int64_t>(16 * at::get_num_threads() / count, 1, heads);
  const int64_t heads_each = (heads + groups - 1) / groups;
  const int64_t threads = useful_threads(args.plan->cost(), args.size);
  for_types(dtype, narrow_tiles, [&]<typename scalar_t, typename tile_t>() {
    Partials<accumulate_t<tile_t>> partials(items, args);
    for_each_item(count * groups, threads, [&] {
      return [&, worker = std::make_unique<ForwardWorker<scalar_t, tile_t>>(args, partials)](int64_t i, int64_t next) {
        const ForwardItem *item = &items.list[i / groups], *after = next < 0 ? nullptr : &items.list[next / groups];
        const int64_t stop = std::min((i % groups + 1) * heads_each, heads);
        for (int64_t g = i % groups * heads_each; g < stop; ++g) {
          const bool last = g + 1 == stop;
          (*worker)(*item, g, last ? after : item, last ? next % groups * heads_each : g + 1);
        }
      };
    });
  });
}

}  // namespace flamingo::CPU_CAPABILITY
