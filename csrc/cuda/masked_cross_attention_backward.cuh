// Backward of masked cross-attention: dq, dk and dv, without atomics, the same to the bit every time.
//
// Two kinds of blocks, 4 warps each, in one launch:
// - The first own 64 keys of one key head and walk the query rows between the first and the last that see any of them
//   (the runs that masked_cross_attention_prepare.cuh found), over all batch rows that share the keys. That gives dk
//   and dv, and from the same reading dq of the rows whose keys all lie in this block.
// - The others own 64 query rows and give dq of those whose keys lie in several blocks, over the hull of these rows
//   alone, and zeros for those that see nothing. Where there are neither they return at once: "latest" intervals and
//   media of 64 keys.
//
//   p = exp(scale·⟨q, k⟩ - lse)    dp = do vᵀ     δ = Σ_j p dp = Σ_d do·o    dv = pᵀ do
//   ds = p ∘ (dp - δ)              dk = scale·dsᵀ q     dq = scale·ds k
// Of rows whose keys all lie in one block, δ is the sum over that block, and o is not read.
//
// Tiling: what is owned is 64 rows of two tensors (k and v, or q and do), 16 rows a warp; what is walked comes in tiles
// of kRows rows of the two others. The first kind makes scores transposed, keys by queries, so that p and ds are in
// registers as dv and dk want them; for dq they pass through shared memory.
//
// Shared memory (bytes, e per element):  two owned tiles: 2·64·D·e | 2 stages of two walked tiles: 4·kRows·D·e |
//   2 stages of lse, δ and intervals of the walked rows, or the intervals of the owned ones: 1 KiB | 64 | parts of δ:
//   512
//   16-bit: D = 64: 34 KiB, D = 128: 66 KiB. ds takes the place of do, and dq that of q, in the stage that was read.
//
// Bound: memory in the "latest" mode (some 80 FLOPs a byte), else the matrix units.
// Occupancy: 4 warps on a multiprocessor, or more: one block where it has 100 KiB, two at D = 64 in 16 bits.
#pragma once

#include "cuda/masked_cross_attention_prepare.cuh"
#include "cuda/softmax.cuh"

namespace flamingo {

template <Precision P, int D>
struct MaskedBackwardTiling {
  using T = Element<P>;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kOwned = 16 * kWarps;
  static constexpr int kRows = sizeof(T) == 4 && D == 128 ? 16 : 32;  // of a tile walked
  static constexpr int kDsColumns = sizeof(T) == 4 ? 32 : kRows;      // rows of 128 bytes in fp32, free of conflicts
  static constexpr int kElements = (2 * kOwned + 4 * kRows) * D;
  static constexpr size_t kBytes = kElements * sizeof(T) + 1024 + 64 + kWarps * kRows * 4;
  static_assert(kOwned == kBackwardKeys && kOwned * kDsColumns <= kRows * D && 2 * 4 * kRows * 4 <= 1024);
};

// The tiles of query rows that see a block of keys, over the batch rows that share it.
struct Walk {
  int64_t b, end;  // batch rows
  int row, last;   // query rows of b
  int R, blocks, block;
  const int32_t* runs;

  FLAMINGO_DEVICE bool done() const { return b >= end; }
  FLAMINGO_DEVICE void open() {
    const auto run = load<Interval>(runs + 2 * (b * blocks + block));
    row = run.lo * R;
    last = run.hi * R;
  }
  FLAMINGO_DEVICE void settle() {  // on a row that there is
    while (!done() && row >= last) {
      if (++b < end) open();
    }
  }
  FLAMINGO_DEVICE void advance(int rows) {
    row += rows;
    settle();
  }
};

// Bit j: whether any token sees key j of a block of 64, for the whole block of threads. `words`: 32 bytes of shared
// memory.
template <int threads>
FLAMINGO_DEVICE uint64_t keys_seen(const MaskedBackward& p, int64_t first_row, int block, int blocks, uint32_t* words) {
  const int K = static_cast<int>(p.size.K), T_ = static_cast<int>(p.size.T), j0 = block * kBackwardKeys;
  uint64_t seen = 0;
  for (int64_t b = first_row; b < first_row + p.size.beams; ++b) {
    const auto run = load<Interval>(p.runs + 2 * (b * blocks + block));
    for (int t = run.lo + threadIdx.x; t < run.hi; t += threads) {
      const Interval token = interval_at(p.start, p.end, b * T_ + t, K);
      const int from = max(token.lo - j0, 0), to = min(token.hi - j0, kBackwardKeys);
      if (from < to) seen |= (to == 64 ? ~uint64_t{0} : (uint64_t{1} << to) - 1) & ~uint64_t{0} << from;
    }
  }
  const auto low = __reduce_or_sync(kWarp, static_cast<uint32_t>(seen));
  const auto high = __reduce_or_sync(kWarp, static_cast<uint32_t>(seen >> 32));
  if (threadIdx.x % 32 == 0) {
    store_shared(words + threadIdx.x / 32 * 2, low);
    store_shared(words + threadIdx.x / 32 * 2 + 1, high);
  }
  __syncthreads();
  seen = 0;
  for (int w = 0; w < threads / 32; ++w) {
    seen |= load_shared<uint32_t>(words + 2 * w) | uint64_t{load_shared<uint32_t>(words + 2 * w + 1)} << 32;
  }
  return seen;
}

template <Precision P, int D>
struct MaskedBackwardKernel {
  using Tiling = MaskedBackwardTiling<P, D>;
  using T = Element<P>;
  using RowTile = Tile<T, D>;
  static constexpr int kOwned = Tiling::kOwned, kRows = Tiling::kRows, kThreads = Tiling::kThreads, N = kRows / 8;

  const MaskedBackward& p;
  T* memory;
  int R, K, T_, lane, warp;

  FLAMINGO_DEVICE MaskedBackwardKernel(const MaskedBackward& p, T* memory)
      : p(p),
        memory(memory),
        R(p.size.H / p.size.G),
        K(static_cast<int>(p.size.K)),
        T_(static_cast<int>(p.size.T)),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32) {}

  FLAMINGO_DEVICE RowTile owned(int which) const { return {memory + which * kOwned * D}; }
  FLAMINGO_DEVICE RowTile walked(int which, int stage) const {
    return {memory + (2 * kOwned + (2 * stage + which) * kRows) * D};
  }
  FLAMINGO_DEVICE unsigned char* rest() const { return reinterpret_cast<unsigned char*>(memory + Tiling::kElements); }

  FLAMINGO_DEVICE int head_of(int row, int g) const { return g * R + row % R; }
  FLAMINGO_DEVICE const T* row_of(const View& x, int64_t b, int row, int g) const {
    return static_cast<const T*>(x.data) + b * x.row + row / R * x.token + head_of(row, g) * x.head;
  }
  FLAMINGO_DEVICE int64_t stat_of(int64_t b, int row, int g) const {
    return (b * p.size.H + head_of(row, g)) * T_ + row / R;
  }
  FLAMINGO_DEVICE T* dq_of(int64_t b, int row, int g) const {
    return static_cast<T*>(p.dq) + ((b * T_ + row / R) * p.size.H + head_of(row, g)) * p.size.D;
  }

  // ---- blocks that own keys
  // ------------------------------------------------------------------------------------------

  // lse, δ, start and end of a tile's query rows, each [kRows]; rows that there are not see nothing.
  FLAMINGO_DEVICE uint32_t* stats(int stage) const { return reinterpret_cast<uint32_t*>(rest()) + stage * 4 * kRows; }
  FLAMINGO_DEVICE Interval walked_interval(int stage, int i) const {
    const auto* const from = reinterpret_cast<const int*>(stats(stage) + 2 * kRows + i);
    return {max(load_shared<int>(from), 0), min(load_shared<int>(from + kRows), K)};
  }

  FLAMINGO_DEVICE void fetch_rows(const Walk& at, int g, int stage) const {
    const auto from = [&](const View& x) {
      return [&, this](int i) -> const T* { return at.row + i < at.last ? row_of(x, at.b, at.row + i, g) : nullptr; };
    };
    fetch<kThreads, kRows>(walked(0, stage), p.size.D, from(p.q));
    fetch<kThreads, kRows>(walked(1, stage), p.size.D, from(p.grad));
    const int which = threadIdx.x / kRows, i = threadIdx.x % kRows, row = at.row + i;
    if (which >= 4) return;
    const bool exists = row < at.last;
    const int64_t stat = exists ? stat_of(at.b, row, g) : 0, token = exists ? at.b * T_ + row / R : 0;
    const void* source = p.lse + stat;
    if (which == 1) source = p.delta + stat;
    if (which == 2) source = p.start + token;
    if (which == 3) source = p.end + token;
    ptx::cp_async<4>(ptx::shared_address(stats(stage) + which * kRows + i), source, exists);
  }

  FLAMINGO_DEVICE void keys_and_their_queries(int block, int blocks, int g, int64_t kv_row) const {
    const int j0 = block * kBackwardKeys;
    Walk at{kv_row * p.size.beams, (kv_row + 1) * p.size.beams, 0, 0, R, blocks, block, p.runs};
    at.open();
    at.settle();
    {
      const uint64_t seen =
          keys_seen<kThreads>(p, at.end - p.size.beams, block, blocks, reinterpret_cast<uint32_t*>(rest() + 1024));
      const auto from = [&](const View& x) {
        const T* const base = static_cast<const T*>(x.data) + kv_row * x.row + g * x.head;
        return [=](int key) -> const T* { return seen >> key & 1 ? base + (j0 + key) * x.token : nullptr; };
      };
      fetch<kThreads, kOwned>(owned(0), p.size.D, from(p.k));
      fetch<kThreads, kOwned>(owned(1), p.size.D, from(p.v));
    }
    if (!at.done()) fetch_rows(at, g, 0);
    ptx::cp_async_commit();

    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    for (int stage = 0; !at.done(); stage ^= 1) {
      const int64_t b = at.b;
      const int row0 = at.row;
      at.advance(kRows);
      if (!at.done()) fetch_rows(at, g, stage ^ 1);
      ptx::cp_async_commit();
      ptx::cp_async_wait<1>();
      __syncthreads();
      add_tile(stage, block, b, row0, g, dk, dv);
      __syncthreads();
    }

    ptx::cp_async_wait<0>();  // of keys that nobody sees
    __syncthreads();
    write_keys(p.dk, owned(0), dk, p.scale, j0, g, kv_row);
    write_keys(p.dv, owned(1), dv, 1.f, j0, g, kv_row);
  }

  FLAMINGO_DEVICE void add_tile(int stage, int block, int64_t b, int row0, int g, float (&dk)[D / 8][4],
                                float (&dv)[D / 8][4]) const {
    const int j = block * kBackwardKeys + 16 * warp + lane / 4;  // of this thread's first key; its second is 8 below
    float s[N][4] = {}, dp[N][4] = {};
    multiply_nt<P>(s, owned(0).from_row(16 * warp), walked(0, stage));
    uint32_t visible = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = 8 * n + 2 * (lane % 4) + e;
        const Interval row = walked_interval(stage, i);
        const float lse = load_shared<float>(stats(stage) + i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = s[n][2 * half + e];
          const bool sees = row.sees(j + 8 * half);
          x = sees ? weight(x * p.scale, lse) : 0.f;
          visible |= static_cast<uint32_t>(sees) << (4 * n + 2 * half + e);
        }
      }
    }
    multiply_nn(dv, Operand<P, N>(s), walked(1, stage));
    multiply_nt<P>(dp, owned(1).from_row(16 * warp), walked(1, stage));

    const Interval own = lane < kRows ? walked_interval(stage, lane) : Interval{0, 0};
    const unsigned inside =
        __ballot_sync(kWarp, own.sees() && !sees_several_blocks(own) && own.lo / kBackwardKeys == block);
    if (inside) share_delta(s, dp, visible);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int i = 8 * n + 2 * (lane % 4);
      float delta[2] = {};
#pragma unroll
      for (int w = 0; w < Tiling::kWarps; ++w) {
        if (!inside) break;
        const auto part = load_shared<Vector<float, 2>>(delta_parts() + w * kRows + i);
        delta[0] += part[0], delta[1] += part[1];
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!(inside >> (i + e) & 1)) delta[e] = load_shared<float>(stats(stage) + kRows + i + e);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int x = 2 * half + e;
          s[n][x] = visible >> (4 * n + x) & 1 ? s[n][x] * (dp[n][x] - delta[e]) : 0.f;
        }
      }
    }
    multiply_nn(dk, Operand<P, N>(s), walked(0, stage));
    if (inside) add_queries(stage, inside, s, b, row0, g);
  }

  // [warps, kRows]: what each warp's keys add to δ of the walked rows.
  FLAMINGO_DEVICE float* delta_parts() const { return reinterpret_cast<float*>(rest() + 1024 + 64); }

  FLAMINGO_DEVICE void share_delta(const float (&weights)[N][4], const float (&dp)[N][4], uint32_t visible) const {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      Vector<float, 2> sums;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float top = visible >> (4 * n + e) & 1 ? weights[n][e] * dp[n][e] : 0.f;
        const float low = visible >> (4 * n + 2 + e) & 1 ? weights[n][2 + e] * dp[n][2 + e] : 0.f;
        float sum = top + low;
#pragma unroll
        for (int bits = 4; bits < 32; bits *= 2) sum += __shfl_xor_sync(kWarp, sum, bits);
        sums.set(e, sum);
      }
      if (lane < 4) store_shared(delta_parts() + warp * kRows + 8 * n + 2 * lane, sums);
    }
    __syncthreads();
  }

  // dq of the rows of a tile whose bit is set, from ds [keys of this warp, rows].
  FLAMINGO_DEVICE void add_queries(int stage, unsigned inside, const float (&ds)[N][4], int64_t b, int row0,
                                   int g) const {
    constexpr int kParts = Tiling::kWarps / (kRows / 16), kColumns = D / kParts;  // a warp's share: 16 rows of kColumns
    const Tile<T, Tiling::kDsColumns> ds_tile{walked(1, stage).data};             // all had read do when δ was shared
    const int rows = warp / kParts * 16, column = warp % kParts * kColumns;
    put(ds_tile.from_row(16 * warp), ds, 0, 1.f, 1.f);
    __syncthreads();
    float dq[kColumns / 8][4] = {};
    multiply_tn<P, kOwned>(dq, ds_tile, rows, owned(0), column);
    const RowTile dq_tile = walked(0, stage);  // all had read q when ds was shared
    put(dq_tile.from_row(rows), dq, column, p.scale, p.scale);
    __syncthreads();
    flush<kRows, D, kThreads>(dq_tile, p.size.D, 0,
                              [&](int i) -> T* { return inside >> i & 1 ? dq_of(b, row0 + i, g) : nullptr; });
  }

  FLAMINGO_DEVICE void write_keys(void* to, const RowTile& tiles, const float (&acc)[D / 8][4], float scale, int j0,
                                  int g, int64_t kv_row) const {
    const RowTile tile = tiles.from_row(16 * warp);
    put(tile, acc, 0, scale, scale);
    __syncwarp();
    flush<16, D>(tile, p.size.D, 0, [&](int i) -> T* {
      const int j = j0 + 16 * warp + i;
      return j < K ? static_cast<T*>(to) + ((kv_row * K + j) * p.size.G + g) * p.size.D : nullptr;
    });
  }

  // ---- blocks that own query rows
  // ------------------------------------------------------------------------------------

  FLAMINGO_DEVICE void queries_of_several_blocks(int tile, int g, int64_t b) const {
    constexpr Interval kDoneElsewhere{0, -1};
    const int row0 = tile * kOwned, all_rows = T_ * R;
    auto* const rows = reinterpret_cast<Interval*>(rest());
    if (threadIdx.x < kOwned) {
      const int row = row0 + threadIdx.x;
      Interval interval = kDoneElsewhere;
      if (row < all_rows) {
        interval = interval_at(p.start, p.end, b * T_ + row / R, K);
        if (!interval.sees()) {
          interval = {0, 0};
        } else if (!sees_several_blocks(interval)) {
          interval = kDoneElsewhere;
        }
      }
      store_shared(rows + threadIdx.x, interval);
    }
    __syncthreads();
    const auto interval_of = [&](int i) { return load_shared<Interval>(rows + i); };
    const Hull hull = hull_of(rows, kOwned);
    const bool blind = interval_of(lane).hi == 0 || interval_of(lane + 32).hi == 0;
    if (hull.first >= hull.last && !__any_sync(kWarp, blind)) return;

    const auto from_rows = [&](const View& x) {
      return [&, this](int i) -> const T* { return interval_of(i).sees() ? row_of(x, b, row0 + i, g) : nullptr; };
    };
    const auto fetch_keys = [&](int j0, int stage) {
      const auto from = [&](const View& x) {
        const T* const base = static_cast<const T*>(x.data) + b / p.size.beams * x.row + g * x.head;
        const int64_t stride = x.token;
        return [=, &hull](int key) -> const T* {
          const int j = j0 + key;
          return j < hull.last && (!hull.gaps || anyone_sees(rows, kOwned, j)) ? base + j * stride : nullptr;
        };
      };
      fetch<kThreads, kRows>(walked(0, stage), p.size.D, from(p.k));
      fetch<kThreads, kRows>(walked(1, stage), p.size.D, from(p.v));
    };
    if (hull.first < hull.last) {
      fetch<kThreads, kOwned>(owned(0), p.size.D, from_rows(p.q));
      fetch<kThreads, kOwned>(owned(1), p.size.D, from_rows(p.grad));
      fetch_keys(hull.first, 0);
    }
    ptx::cp_async_commit();

    const int slot = 16 * warp + lane / 4;  // of this thread's first row; its second is 8 below
    float lse[2] = {}, delta[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!interval_of(slot + 8 * half).sees()) continue;
      const int64_t stat = stat_of(b, row0 + slot + 8 * half, g);
      lse[half] = load<float>(p.lse + stat);
      delta[half] = load<float>(p.delta + stat);
    }
    const Hull own = hull_of(rows + 16 * warp, 16);
    float dq[D / 8][4] = {};
    int stage = 0;
    for (int j0 = hull.first; j0 < hull.last; j0 += kRows, stage ^= 1) {
      if (j0 + kRows < hull.last) fetch_keys(j0 + kRows, stage ^ 1);
      ptx::cp_async_commit();
      ptx::cp_async_wait<1>();
      __syncthreads();
      if (own.meets(j0, kRows)) {
        float s[N][4] = {}, dp[N][4] = {};
        multiply_nt<P>(s, owned(0).from_row(16 * warp), walked(0, stage));
        multiply_nt<P>(dp, owned(1).from_row(16 * warp), walked(1, stage));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Interval row = interval_of(slot + 8 * half);
#pragma unroll
          for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& x = s[n][2 * half + e];
              const bool sees = row.sees(j0 + 8 * n + 2 * (lane % 4) + e);
              x = sees ? weight(x * p.scale, lse[half]) * (dp[n][2 * half + e] - delta[half]) : 0.f;
            }
          }
        }
        multiply_nn(dq, Operand<P, N>(s), walked(0, stage));
      }
      __syncthreads();
    }

    const RowTile dq_tile = owned(0).from_row(16 * warp);  // q, which only this warp reads
    __syncwarp();
    put(dq_tile, dq, 0, p.scale, p.scale);
    __syncwarp();
    flush<16, D>(dq_tile, p.size.D, 0, [&](int i) -> T* {
      return interval_of(16 * warp + i).hi >= 0 ? dq_of(b, row0 + 16 * warp + i, g) : nullptr;
    });
  }
};

template <Precision P, int D>
__global__ void __launch_bounds__(MaskedBackwardTiling<P, D>::kThreads, 1)
    masked_cross_attention_bwd_kernel(const MaskedBackward p) {
  using T = Element<P>;
  constexpr int kOwned = MaskedBackwardTiling<P, D>::kOwned;
  SHARED_MEMORY(T, memory);
  const MaskedBackwardKernel<P, D> kernel(p, memory);
  const int blocks = (kernel.K + kOwned - 1) / kOwned, tiles = (kernel.T_ * kernel.R + kOwned - 1) / kOwned;
  const int64_t of_keys = p.size.B / p.size.beams * p.size.G * blocks;
  const int64_t block = blockIdx.x;
  if (block < of_keys) {
    kernel.keys_and_their_queries(static_cast<int>(block % blocks), blocks, static_cast<int>(block / blocks % p.size.G),
                                  block / blocks / p.size.G);
  } else {
    const int64_t rest = block - of_keys;
    kernel.queries_of_several_blocks(static_cast<int>(rest % tiles), static_cast<int>(rest / tiles % p.size.G),
                                     rest / tiles / p.size.G);
  }
}

}  // namespace flamingo
