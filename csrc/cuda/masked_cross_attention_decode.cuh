// Forward of masked cross-attention for one token a row, as in decoding: memory is read once and little is computed.
//
// Tiling: a block owns the query rows of one key head, 16 of them: all beams that share keys times the R query heads
// that share a key head. So the keys of up to 16 such rows are read once. Keys come in blocks of 16 a warp, and each
// warp keeps an online softmax of its own over its part of every block; at the end they become one.
//
// Shared memory (bytes, e per element):  q: 16·D·e | kStages stages of k and v: 2·kKeys·D·e each, then the warps' sums
// in
//   fp32: 4·16·D·warps | the intervals of 16 rows: 128 | largest score and sum of 16 rows a warp: 128·warps
//   16-bit D = 64: 51 KiB, with 32 KiB on their way while 16 are computed on; D = 128: 69 KiB.
//
// Bound: memory latency and bandwidth. There are as many blocks as rows of k times key heads.
// Occupancy: 2 warps on a multiprocessor, or more: one block, of 4 warps in 16 bits.
#pragma once

#include "cuda/intervals.cuh"
#include "cuda/masked_cross_attention.h"
#include "cuda/softmax.cuh"
#include "cuda/tile.cuh"

namespace flamingo {

template <Precision P, int D>
struct MaskedDecodeTiling {
  using T = Element<P>;
  static constexpr int kWarps = sizeof(T) == 2 ? 4 : 2, kThreads = 32 * kWarps;
  static constexpr int kRows = 16, kKeys = 16 * kWarps;
  static constexpr int kStages = D == 64 ? 3 : 2;
  static constexpr int kElements = (kRows + 2 * kKeys * kStages) * D;
  static constexpr size_t kBytes = kElements * sizeof(T) + kRows * sizeof(Interval) + kWarps * kRows * 8;
  static_assert(kWarps * kRows * D * 4 <= 2 * kKeys * kStages * D * static_cast<int>(sizeof(T)));
};

template <Precision P, int D>
__global__ void __launch_bounds__(MaskedDecodeTiling<P, D>::kThreads, 1)
    masked_cross_attention_decode_kernel(const MaskedForward p) {
  using Tiling = MaskedDecodeTiling<P, D>;
  using T = Element<P>;
  using RowTile = Tile<T, D>;
  constexpr int kRows = Tiling::kRows, kKeys = Tiling::kKeys, kThreads = Tiling::kThreads, kStages = Tiling::kStages;
  constexpr int kWarps = Tiling::kWarps;
  SHARED_MEMORY(T, memory);
  const RowTile q_tile{memory};
  auto* const rows = reinterpret_cast<Interval*>(memory + Tiling::kElements);
  auto* const ends = reinterpret_cast<Vector<float, 2>*>(rows + kRows);  // [warps, rows]: largest score, sum of weights
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const int R = p.size.H / p.size.G, K = static_cast<int>(p.size.K);
  const int64_t all_rows = p.size.beams * R, tiles = (all_rows + kRows - 1) / kRows, block = blockIdx.x;
  const int g = static_cast<int>(block / tiles % p.size.G);
  const int64_t row0 = block % tiles * kRows, kv_row = block / tiles / p.size.G;
  const int count = static_cast<int>(all_rows - row0 < kRows ? all_rows - row0 : kRows);
  const auto b_of = [&](int i) { return kv_row * p.size.beams + (row0 + i) / R; };
  const auto h_of = [&](int i) { return g * R + static_cast<int>((row0 + i) % R); };

  if (threadIdx.x < kRows) {
    const int i = threadIdx.x;
    store_shared(rows + i, i < count ? interval_at(p.start, p.end, b_of(i), K) : Interval{0, 0});
  }
  __syncthreads();
  const Hull hull = hull_of(rows, kRows);
  const auto fetch_keys = [&](int j0, int stage) {
    const auto from = [&](const View& x) {
      const T* const base = static_cast<const T*>(x.data) + kv_row * x.row + g * x.head;
      const int64_t stride = x.token;
      return [=, &hull](int key) -> const T* {
        const int j = j0 + key;
        return j < hull.last && (!hull.gaps || anyone_sees(rows, kRows, j)) ? base + j * stride : nullptr;
      };
    };
    fetch<kThreads, kKeys>(q_tile.from_row(kRows + 2 * stage * kKeys), p.size.D, from(p.k));
    fetch<kThreads, kKeys>(q_tile.from_row(kRows + (2 * stage + 1) * kKeys), p.size.D, from(p.v));
  };
  if (hull.first < hull.last) {
    fetch<kThreads, kRows>(q_tile, p.size.D, [&](int i) -> const T* {
      if (!load_shared<Interval>(rows + i).sees()) return nullptr;
      return static_cast<const T*>(p.q.data) + b_of(i) * p.q.row + h_of(i) * p.q.head;
    });
  }
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (hull.first + stage * kKeys < hull.last) fetch_keys(hull.first + stage * kKeys, stage);
    ptx::cp_async_commit();
  }

  const Interval top = load_shared<Interval>(rows + lane / 4), low = load_shared<Interval>(rows + lane / 4 + 8);
  Softmax<D> state;
  int stage = 0;
  for (int j0 = hull.first; j0 < hull.last; j0 += kKeys) {
    const int ahead = j0 + (kStages - 1) * kKeys;
    if (ahead < hull.last) fetch_keys(ahead, stage == 0 ? kStages - 1 : stage - 1);
    ptx::cp_async_commit();
    ptx::cp_async_wait<kStages - 1>();
    __syncthreads();
    const RowTile k_tile = q_tile.from_row(kRows + 2 * stage * kKeys + 16 * warp);
    float s[2][4] = {};
    multiply_nt<P>(s, q_tile, k_tile);
    state.see(s, p.scale, j0 + 16 * warp, top, low);
    multiply_nn(state.acc, Operand<P, 2>(s), k_tile.from_row(kKeys));
    __syncthreads();
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }

  // The warps' results become one: each is brought to the largest score of all.
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Vector<float, 2> end;
    end.set(0, state.most[half]);
    end.set(1, quad_sum(state.total[half]));
    if (lane % 4 == 0) store_shared(ends + warp * kRows + lane / 4 + 8 * half, end);
  }
  __syncthreads();
  const auto most_of = [&](int i) {
    float most = -INFINITY;
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, load_shared<Vector<float, 2>>(ends + w * kRows + i)[0]);
    return most;
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float most = most_of(lane / 4 + 8 * half);
    factor[half] = most == -INFINITY ? 1.f : exp_of(state.most[half] - most);  // where all is -inf, sums are 0 or NaN
  }
  const Tile<float, D> sums{reinterpret_cast<float*>(memory + kRows * D)};
  put(sums.from_row(16 * warp), state.acc, 0, factor[0], factor[1]);
  __syncthreads();

  // A chunk of o is one or two of the sums. Every other four lanes take two in reverse, or lanes would meet in a bank.
  constexpr int kPerChunk = Vector<T>::kSize, kParts = kPerChunk / 4;
  const int turn = kParts == 2 ? threadIdx.x / 4 % 2 : 0;
  for (int x = threadIdx.x; x < count * (D / kPerChunk); x += kThreads) {
    const int i = x / (D / kPerChunk), column = x % (D / kPerChunk) * kPerChunk;
    const float most = most_of(i);
    float total = 0, sum[kPerChunk] = {};
    for (int w = 0; w < kWarps; ++w) {
      const auto end = load_shared<Vector<float, 2>>(ends + w * kRows + i);
      total += end[1] * (most == -INFINITY ? 1.f : exp_of(end[0] - most));
      Vector<float> part[kParts];
#pragma unroll
      for (int e = 0; e < kParts; ++e) {
        part[e] = load_shared<Vector<float>>(sums.at(16 * w + i, column + 4 * (e ^ turn)));
      }
#pragma unroll
      for (int e = 0; e < kPerChunk; ++e) sum[e] += turn ? part[kParts - 1 - e / 4][e % 4] : part[e / 4][e % 4];
    }
    const float inverse = total == 0 ? 0.f : 1.f / total;
    Vector<T> o;
#pragma unroll
    for (int e = 0; e < kPerChunk; ++e) o.set(e, sum[e] * inverse);
    const int64_t query = b_of(i) * p.size.H + h_of(i);
    if (column < p.size.D) store(static_cast<T*>(p.o) + query * p.size.D + column, o);
    if (column == 0) store(p.lse + query, total == 0 ? -INFINITY : most + logf(total));
  }
}

}  // namespace flamingo
