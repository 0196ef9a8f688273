// Forward of masked cross-attention: o = softmax(scale · q kᵀ over the keys a row sees) v, and its log-sum-exp.
//
// Tiling: a block owns up to 16·warps query rows of one key head, a warp 16 of them, and walks the keys between the
// smallest start and the largest end of its rows in blocks of kKeys; a warp passes over what its own rows do not see.
// Where a key head has one query head, blocks own half as many rows on average, cut where rows begin to see other keys:
// so, in the "latest" mode, the keys of a media are read by one block, unless its run of rows is longer than that.
//
// Shared memory (bytes, e per element):  q, later o: kRows·D·e | 2 stages of k: 2·kKeys·D·e | 2 stages of v | 8·kRows
//   16-bit D = 64: 49 KiB, 2 blocks of 8 warps on a multiprocessor; D = 128: 97 KiB, 1 block. fp32: 1 block.
//
// Bound: memory, for runs of some dozens of rows on 64 keys (about 30 FLOPs a byte); where every row sees thousands of
// keys, the matrix units and shared memory.
// Occupancy: 8 warps on a multiprocessor, or more: one block where it has 100 KiB, two at D = 64 in 16 bits.
//
// Pipeline: k and v of a block are two cp.async groups. While scores of block i are made, v of i and k of i + 1 are on
// their way; two barriers a block of keys.
#pragma once

#include "cuda/intervals.cuh"
#include "cuda/masked_cross_attention.h"
#include "cuda/softmax.cuh"
#include "cuda/tile.cuh"

namespace flamingo {

template <Precision P, int D>
struct MaskedForwardTiling {
  using T = Element<P>;
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kKeys = kHalf ? 64 : D < 128 ? 32 : 16;
  static constexpr int kBlocks = kHalf && D == 64 ? 2 : 1;  // on a multiprocessor
  static constexpr size_t kBytes = (kRows + 4 * kKeys) * D * sizeof(T) + kRows * sizeof(Interval);
};

// Query rows from one block to the next, before cutting.
__host__ __device__ constexpr int masked_forward_step(int rows, int R) { return R == 1 ? rows / 2 : rows; }

// Where a block's rows begin that would begin at `from`, rows counted from the start of its window: where the next
// interval begins, if that is less than `reach` rows on.
FLAMINGO_DEVICE int cut(const Interval* rows, int from, int reach) {
  for (int i0 = from; i0 < from + reach; i0 += 32) {
    const int i = i0 + static_cast<int>(threadIdx.x) % 32;
    const auto row = load_shared<Interval>(rows + i);
    const auto before = load_shared<Interval>(rows + max(i - 1, 0));
    const unsigned changes = __ballot_sync(kWarp, i > from && (row.lo != before.lo || row.hi != before.hi));
    if (changes) return i0 + __ffs(changes) - 1;
  }
  return from;
}

template <Precision P, int D>
__global__ void __launch_bounds__(MaskedForwardTiling<P, D>::kThreads, MaskedForwardTiling<P, D>::kBlocks)
    masked_cross_attention_fwd_kernel(const MaskedForward p) {
  using Tiling = MaskedForwardTiling<P, D>;
  using T = typename Tiling::T;
  using RowTile = Tile<T, D>;
  constexpr int kRows = Tiling::kRows, kKeys = Tiling::kKeys, kThreads = Tiling::kThreads;
  constexpr int N = kKeys / 8;
  SHARED_MEMORY(T, memory);
  const RowTile q_tile{memory}, k_tiles{memory + kRows * D}, v_tiles{memory + (kRows + 2 * kKeys) * D};
  auto* const window = reinterpret_cast<Interval*>(memory + (kRows + 4 * kKeys) * D);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const int R = p.size.H / p.size.G, K = static_cast<int>(p.size.K), T_ = static_cast<int>(p.size.T);
  const int step = masked_forward_step(kRows, R), reach = kRows - step;
  const int all_rows = T_ * R, tiles = (all_rows + step - 1) / step;
  const int tile = blockIdx.x % tiles, g = blockIdx.x / tiles % p.size.G;
  const int64_t b = blockIdx.x / tiles / p.size.G;

  // The rows of this block: `count` of them from `row0`.
  const int window0 = tile * step;
  for (int i = threadIdx.x; i < kRows; i += kThreads) {
    const int row = window0 + i;
    store_shared(window + i, row < all_rows ? interval_at(p.start, p.end, b * T_ + row / R, K) : Interval{0, 0});
  }
  __syncthreads();
  const int begin = tile == 0 ? 0 : cut(window, 0, reach);
  const int end = min(window0 + step < all_rows ? cut(window, step, reach) : kRows, all_rows - window0);
  const Interval* const rows = window + begin;
  const int count = end - begin, row0 = window0 + begin;
  if (count <= 0) return;
  const Hull hull = hull_of(rows, count);
  const Hull own = hull_of(rows + 16 * warp, min(count - 16 * warp, 16));
  const int slot = 16 * warp + lane / 4;  // of this thread's first row; its second is 8 below
  const auto interval_of = [&](int i) { return i < count ? load_shared<Interval>(rows + i) : Interval{0, 0}; };

  const auto row_of = [&](const View& x, int row) {
    const int t = row / R, h = g * R + row % R;
    return static_cast<const T*>(x.data) + b * x.row + t * x.token + h * x.head;
  };
  const int64_t kv_row = b / p.size.beams;
  const T* const k = static_cast<const T*>(p.k.data) + kv_row * p.k.row + g * p.k.head;
  const T* const v = static_cast<const T*>(p.v.data) + kv_row * p.v.row + g * p.v.head;
  const auto fetch_keys = [&](const RowTile& into, const T* from, int64_t stride, int j0) {
    fetch<kThreads, kKeys>(into, p.size.D, [&](int key) -> const T* {
      const int j = j0 + key;
      return j < hull.last && (!hull.gaps || anyone_sees(rows, count, j)) ? from + j * stride : nullptr;
    });
  };

  if (hull.first < hull.last) {
    fetch<kThreads, kRows>(q_tile, p.size.D,
                           [&](int i) -> const T* { return interval_of(i).sees() ? row_of(p.q, row0 + i) : nullptr; });
    fetch_keys(k_tiles, k, p.k.token, hull.first);
  }
  ptx::cp_async_commit();
  if (hull.first < hull.last) fetch_keys(v_tiles, v, p.v.token, hull.first);
  ptx::cp_async_commit();

  Softmax<D> state;
  int stage = 0;
  for (int j0 = hull.first; j0 < hull.last; j0 += kKeys, stage ^= 1) {
    const RowTile k_tile = k_tiles.from_row(stage * kKeys), v_tile = v_tiles.from_row(stage * kKeys);
    const bool more = j0 + kKeys < hull.last, mine = own.meets(j0, kKeys);
    float s[N][4] = {};
    if (more) fetch_keys(k_tiles.from_row((stage ^ 1) * kKeys), k, p.k.token, j0 + kKeys);
    ptx::cp_async_commit();
    ptx::cp_async_wait<2>();
    __syncthreads();
    if (mine) {
      multiply_nt<P>(s, q_tile.from_row(16 * warp), k_tile);
      state.see(s, p.scale, j0, interval_of(slot), interval_of(slot + 8));
    }
    const Operand<P, N> weights(s);
    if (more) fetch_keys(v_tiles.from_row((stage ^ 1) * kKeys), v, p.v.token, j0 + kKeys);
    ptx::cp_async_commit();
    ptx::cp_async_wait<2>();
    __syncthreads();
    if (mine) multiply_nn(state.acc, weights, v_tile);
  }

  const SoftmaxEnd result = state.finish();
  const auto h_of = [&](int row) { return g * R + row % R; };
  const RowTile o_tile = q_tile.from_row(16 * warp);  // read by this warp alone
  __syncwarp();
  put(o_tile, state.acc, 0, result.inverse[0], result.inverse[1]);
  __syncwarp();
  flush<16, D>(o_tile, p.size.D, 0, [&](int i) -> T* {
    const int row = row0 + 16 * warp + i;
    if (16 * warp + i >= count) return nullptr;
    return static_cast<T*>(p.o) + ((b * T_ + row / R) * p.size.H + h_of(row)) * p.size.D;
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = slot + 8 * half, row = row0 + i;
    if (lane % 4 == 0 && i < count) store(p.lse + (b * p.size.H + h_of(row)) * T_ + row / R, result.lse[half]);
  }
}

}  // namespace flamingo
