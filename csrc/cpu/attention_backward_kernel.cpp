// Backward of attention on the CPU; compiled once per ISA. Per component (plan.h) and key head; S is
// recomputed, transposed, from lse, and dK and dV gather in scratch:
//
//   Sᵀ = K Qᵀ,  Pᵀ = exp(scale·Sᵀ - lse),  dSᵀ = Pᵀ ∘ (V dOᵀ - δ),  dV += Pᵀ dO,  dK += dSᵀ Q,  dQ += dS K
//
// With Sᵀ, the left operands K, V, Pᵀ, dSᵀ and the right ones dO, Q, K are in place; only Q, dO and dS are transposed.
// Five matmuls for each pair of tile and block. Where components are too few to fill the machine ("all" mode, one row),
// dQ is done by tile and dK, dV by blocks of keys, at seven matmuls.

#include <memory>

#include "attention_rows.h"
#include "parallel.h"

namespace flamingo::CPU_CAPABILITY {
namespace {

template <typename scalar_t, typename tile_t>
class BackwardWorker {
  using acc_t = accumulate_t<tile_t>;

 public:
  BackwardWorker(const BackwardArgs& args, int64_t most_keys)
      : args_(args), plan_(*args.plan), size_(args.size), sizes_(TileSizes::of<tile_t>(size_)), most_keys_(most_keys) {
    carve();
    arena_.allocate();
    carve();
  }
  ~BackwardWorker() { release_matmul<tile_t>(); }

  // `next` is the item that this worker does after this one, or null.
  void operator()(const BackwardItem& item, const BackwardItem* next) {
    Ahead<scalar_t> ahead = soon(item, next);
    // With a single tile nothing gathers: each block of dK and dV is stored as soon as it is there.
    gathers_ = item.tile_end - item.tile_begin != 1 || !plan_.tiles[item.tile_begin].uniform;
    if (item.want_dkv && gathers_) {
      std::fill_n(dk_, (item.key_end - item.key_begin) * size_.dim, acc_t(0));
      std::fill_n(dv_, (item.key_end - item.key_begin) * size_.dim, acc_t(0));
    }
    for (int64_t i = item.tile_begin; i < item.tile_end; ++i) {
      const Tile& tile = plan_.tiles[i];
      if (!item.want_dq && (tile.key_end <= item.key_begin || item.key_end <= tile.key_begin)) continue;
      if (!tile.uniform && poisoned(tile, item.kv_head)) {
        for_each_single(args_, tile, [&](const Tile& single) { differentiate(single, item, ahead); });
      } else {
        differentiate(tile, item, ahead);
      }
    }
    if (item.want_dkv && gathers_) store_dkv(item, item.key_begin, item.key_end);
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
      poison += poison_of_row<acc_t>(key_at<scalar_t>(source_of(args_, j), tile.kv_row, j, g), size_.dim);
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
      const Tile& tile = plan_.tiles[item.tile_begin];
      const int64_t at = contiguous_row(size_, tile.kv_row, tile.first, item.kv_head);
      ahead.add(static_cast<const scalar_t*>(args_.dq) + at, ld, tile.count, /*write=*/true);
    }
    if (item.want_dkv) {
      const int64_t keys = plan_.block_end(item.first_key, item.key_begin, item.key_end) - item.key_begin;
      const KeySource& source = source_of(args_, item.key_begin);
      const int64_t at = contiguous_key(source, item, item.key_begin);
      ahead.add(static_cast<const scalar_t*>(source.dk) + at, ld, keys, /*write=*/true);
      ahead.add(static_cast<const scalar_t*>(source.dv) + at, ld, keys, /*write=*/true);
    }
    if (!next || next->tile_begin == next->tile_end) return ahead;
    const Tile& tile = plan_.tiles[next->tile_begin];
    const int64_t keys = plan_.block_end(tile.key_begin, tile.key_begin, tile.key_end) - tile.key_begin;
    const auto add = [&](const void* data, const Strides& strides, int64_t first, int64_t count) {
      ahead.add(row_at<scalar_t>(data, strides, tile.kv_row, first, next->kv_head), strides.token, count);
    };
    add(args_.q, args_.q_strides, tile.first, tile.count);
    add(args_.d_out, args_.d_out_strides, tile.first, tile.count);
    add(args_.o, {size_.tokens * ld, ld, size_.dim}, tile.first, tile.count);
    const KeySource& source = source_of(args_, tile.key_begin);
    add(source.k, source.k_strides, tile.key_begin - source.first, keys);
    add(source.v, source.v_strides, tile.key_begin - source.first, keys);
    return ahead;
  }

  int64_t contiguous_key(const KeySource& source, const BackwardItem& item, int64_t j) const {
    return ((item.kv_row * source.keys + j - source.first) * size_.kv_heads + item.kv_head) * size_.dim;
  }

  void differentiate(const Tile& tile, const BackwardItem& item, Ahead<scalar_t>& ahead) {
    const int64_t rows = tile.count * (size_.heads / size_.kv_heads);
    load_queries(tile, item.kv_head, rows);
    if (item.want_dq && tile.key_begin == tile.key_end) std::fill_n(dq_, rows * size_.dim, acc_t(0));
    const int64_t key_begin = std::max(tile.key_begin, item.key_begin);
    const int64_t key_end = std::min(tile.key_end, item.key_end);
    for (int64_t j = key_begin, next; j < key_end; j = next) {
      next = plan_.block_end(item.first_key, j, key_end);
      differentiate_block(tile, item, rows, j, next - j, j == tile.key_begin, ahead);
    }
    if (!item.want_dq) return;
    for_each_row(size_, tile, item.kv_head, [&](int64_t r, int64_t b, int64_t t, int64_t h) {
      scale_row(static_cast<scalar_t*>(args_.dq) + contiguous_row(size_, b, t, h), dq_ + r * size_.dim, size_.dim,
                static_cast<acc_t>(args_.softmax_scale));
    });
  }

  // Q and dO as right operands, straight and transposed; lse and δ = ⟨dO, O⟩ of each row.
  void load_queries(const Tile& tile, int64_t g, int64_t rows) {
    const int64_t columns = round_up(rows, kRowsStep);
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
    const int64_t columns = round_up(rows, kRowsStep), inner = round_up(rows, kRowStep);
    const int64_t ld = sizes_.rows;
    const KeySource& source = source_of(args_, j);
    const auto* k = key_at<scalar_t>(source, tile.kv_row, j, item.kv_head);
    const auto* v = value_at<scalar_t>(source, tile.kv_row, j, item.kv_head);
    const auto [k_rows, k_ld] = rows_left(rows_, k, source.k_strides.token, keys, size_.dim, sizes_.depth);
    matmul(keys, columns, sizes_.depth, k_rows, k_ld, qt_, columns, st_, ld, false, ahead);
    const auto [v_rows, v_ld] = rows_left(v_rows_, v, source.v_strides.token, keys, size_.dim, sizes_.depth);
    matmul(keys, columns, sizes_.depth, v_rows, v_ld, dot_, columns, dpt_, ld, false, ahead);
    scores_gradient(tile, j, keys, columns, ahead);
    if (item.want_dkv) {
      const int64_t at = gathers_ ? (j - item.key_begin) * size_.dim : 0;
      matmul(keys, size_.dim, inner, pt_, ld, do_, size_.dim, dv_ + at, size_.dim, gathers_, ahead);
      matmul(keys, size_.dim, inner, dst_, ld, q_, size_.dim, dk_ + at, size_.dim, gathers_, ahead);
      if (!gathers_) store_dkv(item, j, j + keys);
    }
    if (item.want_dq) {
      const int64_t inner_keys = is_vnni<tile_t> ? round_up(keys, 2) : keys;
      const auto [k_right, k_right_ld] = rows_right(k_, k, source.k_strides.token, keys, size_.dim, inner_keys);
      transpose_blocks<kRowsStep>(ds_, kBlockKeys, dst_, ld, keys, columns, inner_keys);
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

  // The keys begin .. end of an item, which begin the scratch.
  void store_dkv(const BackwardItem& item, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t from = (j - begin) * size_.dim;
      const KeySource& source = source_of(args_, j);
      const int64_t to = contiguous_key(source, item, j);
      scale_row(static_cast<scalar_t*>(source.dk) + to, dk_ + from, size_.dim, static_cast<acc_t>(args_.softmax_scale));
      scale_row(static_cast<scalar_t*>(source.dv) + to, dv_ + from, size_.dim, acc_t(1));
    }
  }

  const BackwardArgs& args_;
  const Plan& plan_;
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
  bool gathers_;                       // whether dk_ and dv_ hold all keys of the item, not one block
};

}  // namespace

void attention_backward(c10::ScalarType dtype, bool narrow_tiles, const BackwardArgs& args) {
  const BackwardItems items = backward_items(*args.plan, args.size.kv_heads, at::get_num_threads());
  const BackwardItem* list = items.list.data();
  // As in forward: neighbours in the list are heads of one component.
  const int64_t count = static_cast<int64_t>(items.list.size());
  const int64_t each = std::clamp<int64_t>(count / (16 * at::get_num_threads()), 1, args.size.kv_heads);
  const int64_t threads = useful_threads(args.plan->cost(), args.size);
  for_types(dtype, narrow_tiles, [&]<typename scalar_t, typename tile_t>() {
    for_each_item((count + each - 1) / each, threads, [&] {
      return [&, worker = std::make_unique<BackwardWorker<scalar_t, tile_t>>(args, items.most_keys)](int64_t part,
                                                                                                     int64_t next) {
        const BackwardItem* after = next < 0 ? nullptr : list + next * each;
        const int64_t stop = std::min((part + 1) * each, count);
        for (int64_t i = part * each; i < stop; ++i) (*worker)(list[i], i + 1 < stop ? list + i + 1 : after);
      };
    });
  });
}

}  // namespace flamingo::CPU_CAPABILITY
