// LayerNorm and RMSNorm over rows, forward and backward.
//
//     x̂ = (x - mean(x)) / sqrt(var(x) + eps), for RMSNorm x / sqrt(mean(x²) + eps);   z = x̂ · weight + bias
//     forward of y = x + tanh(gate) · branch, which is written, in the place of x, where there is a branch
//     with dx̂ = dz · weight:   dx = residual + (dx̂ - mean(dx̂) - x̂ mean(dx̂ · x̂)) / sqrt(...), for RMSNorm without
//     mean(dx̂)
//
// Tiling: a team of 32 to 512 threads shares a row, 16 columns each in groups of 8 (of 4, if all is fp32). Rows of up
// to 8192 columns so stay in registers, and memory is read once. A block takes every gridDim-th tile of as many rows as
// it has teams. Rows that are wider, or that cannot be read in groups, are read again, chunk by chunk, for each
// statistic, a block's team taking one at a time; they add to their block's parts in place.
//
// Shared memory: [2, sums, 32] fp32 sums of warps; then, for rows in registers, weight and bias in fp32 [2, team · 16],
// 64 KB at the most; in their place at the end, with sums, those of all threads [16, threads + 32 / G], 33 KB.
//
// Bound: bytes. Forward reads x and writes z, or reads x and branch and writes y and z; backward reads dz, x and
// residual, writes dx and z; and parts, which are 8 bytes a column and block: with a block on each of 132
// multiprocessors, 10 % of what 2048 rows of bf16 need. Forward runs two blocks on each; every block asks for weight
// and bias, which the L2 cache has but for the first time.
#pragma once

#include "cuda/norm.h"
#include "cuda/rows.cuh"

namespace flamingo {

constexpr int kNormMostThreads = 512;

// Columns that a thread has at a time.
template <int G>
constexpr int kNormHeld = G == 1 ? 4 : 16;

template <typename Call>
struct NormParams {
  Call call;
  int64_t tiles;
  int team;
};

struct Statistics {
  float mean = 0.f, rest = 0.f, rstd = 0.f;  // rest: what the first mean was rounded by

  FLAMINGO_DEVICE float centred(float x) const { return x - mean - rest; }
  FLAMINGO_DEVICE float normalized(float x) const { return centred(x) * rstd; }
};

// A team's row: the columns that a thread has of it. Without groups there may be several chunks of them, each to be
// loaded again whenever it is needed.
template <int G>
struct TeamRow {
  static constexpr int N = kNormHeld<G>;
  static constexpr bool kAgain = G == 1;

  Columns<N, G> columns;
  int width;

  FLAMINGO_DEVICE TeamRow(const Team& team, int width) : columns{team.rank, team.size, 0, width}, width(width) {}

  // f() for each chunk, after load() where x may hold another one.
  template <typename Load, typename F>
  FLAMINGO_DEVICE void each_chunk(Load load, F f) {
    if constexpr (kAgain) {
#pragma unroll 1
      for (int first = 0; first < width; first += columns.size * N) {
        columns.first = first;
        load();
        f();
      }
    } else {
      f();
    }
  }

  // f(g, column of it) for the first column of each group that is there
  template <typename F>
  FLAMINGO_DEVICE void each_group(F f) const {
#pragma unroll
    for (int g = 0; g < N; g += G) {
      const int column = columns.at(g);
      if (column < columns.count) f(g, column);
    }
  }
};

// Of a row of which x holds this thread's columns once load() was called for the chunk.
template <int G, int S, typename Load>
FLAMINGO_DEVICE Statistics row_statistics(TeamRow<G>& row, const float (&x)[kNormHeld<G>], bool layer, float eps,
                                          TeamSums<S>& team_sums, Load load) {
  Statistics statistics;
  const auto mean_of = [&](auto term) {
    float sum[1] = {0.f};
    row.each_chunk(load, [&] {
      row.each_group([&](int g, int) {
#pragma unroll
        for (int i = g; i < g + G; i++) sum[0] += term(statistics.centred(x[i]));
      });
    });
    team_sums(sum, row.columns.size);
    return sum[0] / static_cast<float>(row.width);
  };
  if (layer) {
    const auto itself = [](float centred) { return centred; };
    statistics.mean = mean_of(itself);
    statistics.rest = mean_of(itself);  // nothing is left of a constant row
  }
  statistics.rstd = rsqrtf(mean_of([](float centred) { return centred * centred; }) + eps);
  return statistics;
}

// Weight and bias, 1 and 0 where there are none. For rows in registers they wait in shared memory, a thread's columns
// in fours, so that the threads of a warp have theirs side by side.
template <int G>
struct Affine {
  static constexpr int N = kNormHeld<G>;

  const Array &weight, &bias;
  float* memory;

  // The first team puts them there; to be followed by a barrier.
  FLAMINGO_DEVICE void fill(const Team& team, const Columns<N, G>& columns) const {
    if (G == 1 || team.index != 0) return;
    fill(weight, 1.f, memory, columns);
    fill(bias, 0.f, memory + columns.size * N, columns);
  }

  // Of the group at g, which begins with `column`.
  FLAMINGO_DEVICE void get(float (&w)[G], float (&b)[G], const Columns<N, G>& columns, int g, int column) const {
    if constexpr (G == 1) {
      w[0] = weight.data == nullptr ? 1.f : load_number(weight, column);
      b[0] = bias.data == nullptr ? 0.f : load_number(bias, column);
    } else {
#pragma unroll
      for (int i = 0; i < G; i += 4) {
        const float* const four = memory + ((g + i) / 4 * columns.size + columns.rank) * 4;
        const auto of_weight = load_shared<Vector<float>>(four);
        const auto of_bias = load_shared<Vector<float>>(four + columns.size * N);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          w[i + j] = of_weight[j];
          b[i + j] = of_bias[j];
        }
      }
    }
  }

 private:
  static FLAMINGO_DEVICE void fill(const Array& array, float otherwise, float* memory, const Columns<N, G>& columns) {
    float x[N];
    load_parameter(x, array, columns, otherwise);
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const Vector<float> four{{x[i], x[i + 1], x[i + 2], x[i + 3]}};
      store_shared(memory + (i / 4 * columns.size + columns.rank) * 4, four);
    }
  }
};

// Occupancy: 16 warps on a multiprocessor, or more; 32 of rows up to 4096 columns, or where it has more than 100 KB of
// shared memory.
template <typename X, typename Z, int G>
__global__ void __launch_bounds__(kNormMostThreads, 2) norm_fwd_kernel(const NormParams<NormForward> p) {
  SHARED_MEMORY(float, memory);
  const NormForward& call = p.call;
  const Team team(p.team);
  TeamSums<1> team_sums{memory};
  TeamRow<G> row(team, call.columns);
  const Affine<G> affine{call.weight, call.bias, memory + TeamSums<1>::kFloats};
  affine.fill(team, row.columns);
  const float t = call.gate.data == nullptr ? 1.f : tanhf(load_number(call.gate, 0));
  __syncthreads();

#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const int64_t at = tile * team.count + team.index;
    row.columns.count = at < call.rows ? call.columns : 0;
    float x[kNormHeld<G>];
    const auto load_x = [&] {
      load_columns(x, static_cast<const X*>(call.x.data) + at * call.x.stride, row.columns);
      if (call.branch.data == nullptr) return;
      float branch[kNormHeld<G>];
      load_columns(branch, static_cast<const X*>(call.branch.data) + at * call.branch.stride, row.columns);
#pragma unroll
      for (int i = 0; i < kNormHeld<G>; i++) x[i] = to_float(from_float<X>(x[i] + branch[i] * t));  // as y is stored
    };
    load_x();
    const Statistics statistics = row_statistics(row, x, call.layer, call.eps, team_sums, load_x);
    row.each_chunk(load_x, [&] {
      row.each_group([&](int g, int column) {
        const int64_t to = at * call.columns + column;
        if (call.y != nullptr) store_group<G>(static_cast<X*>(call.y) + to, &x[g]);
        if (call.copy != nullptr) store_group<G>(static_cast<X*>(call.copy) + to, &x[g]);
        float z[G], weight[G], bias[G];
        affine.get(weight, bias, row.columns, g, column);
#pragma unroll
        for (int i = 0; i < G; i++) z[i] = statistics.normalized(x[g + i]) * weight[i] + bias[i];
        store_group<G>(static_cast<Z*>(call.z.data) + to, z);
      });
    });
  }
}

// What all teams of a block have summed, column by column, to part [columns].
template <int G>
FLAMINGO_DEVICE void store_sums(float* part, const float (&sums)[kNormHeld<G>], const Columns<kNormHeld<G>, G>& columns,
                                int width, float* memory) {
  const int threads = blockDim.x, stride = threads + 32 / G;  // the gap keeps a group's columns in different banks
  __syncthreads();                                            // until nobody reads what was here
#pragma unroll
  for (int i = 0; i < kNormHeld<G>; i++) store_shared(memory + i * stride + threadIdx.x, sums[i]);
  __syncthreads();
  for (int column = threadIdx.x; column < width; column += threads) {
    const int group = column / G, i = group / columns.size * G + column % G;
    float sum = 0.f;
    for (int thread = group % columns.size; thread < threads; thread += columns.size) {
      sum += load_shared<float>(memory + i * stride + thread);
    }
    store(part + column, sum);
  }
}

// Occupancy: 16 warps on a multiprocessor, or more.
template <typename X, typename Z, int G>
__global__ void __launch_bounds__(kNormMostThreads, 1) norm_bwd_kernel(const NormParams<NormBackward> p) {
  constexpr int N = kNormHeld<G>;
  SHARED_MEMORY(float, memory);
  const NormBackward& call = p.call;
  const Team team(p.team);
  TeamSums<2> team_sums{memory};
  TeamRow<G> row(team, call.columns);
  const Affine<G> affine{call.weight, call.bias, memory + TeamSums<2>::kFloats};
  affine.fill(team, row.columns);
  __syncthreads();

  const bool sums = call.part_weight != nullptr;
  float* const part_weight = call.part_weight + blockIdx.x * static_cast<int64_t>(call.columns);
  float* const part_bias = call.part_bias + blockIdx.x * static_cast<int64_t>(call.columns);
  float sum_weight[N], sum_bias[N];  // of rows in registers
#pragma unroll
  for (int i = 0; i < N; i++) sum_weight[i] = sum_bias[i] = 0.f;

#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const int64_t at = tile * team.count + team.index;
    row.columns.count = at < call.rows ? call.columns : 0;
    float x[N], dz[N];
    const auto load_x = [&] { load_columns(x, static_cast<const X*>(call.x.data) + at * call.x.stride, row.columns); };
    const auto load_both = [&] {
      load_x();
      load_columns(dz, static_cast<const X*>(call.dz.data) + at * call.dz.stride, row.columns);
    };
    load_both();
    const Statistics statistics = row_statistics(row, x, call.layer, call.eps, team_sums, load_x);

    float means[2] = {0.f, 0.f};  // of dx̂ and of dx̂ · x̂
    row.each_chunk(load_both, [&] {
      row.each_group([&](int g, int column) {
        float weight[G], bias[G];
        affine.get(weight, bias, row.columns, g, column);
#pragma unroll
        for (int i = 0; i < G; i++) {
          const float dx_hat = __fmul_rn(dz[g + i], weight[i]);
          means[0] += dx_hat;
          means[1] += dx_hat * statistics.normalized(x[g + i]);
        }
      });
    });
    team_sums(means, team.size);
    means[0] = call.layer ? means[0] / static_cast<float>(call.columns) : 0.f;
    means[1] /= static_cast<float>(call.columns);

    row.each_chunk(load_both, [&] {
      row.each_group([&](int g, int column) {
        float weight[G], bias[G], dx[G], z[G];
        affine.get(weight, bias, row.columns, g, column);
        if (call.residual.data != nullptr) {
          load_group<G>(dx, static_cast<const X*>(call.residual.data) + at * call.residual.stride + column);
        } else {
#pragma unroll
          for (int i = 0; i < G; i++) dx[i] = 0.f;
        }
#pragma unroll
        for (int i = 0; i < G; i++) {
          const float x_hat = statistics.normalized(x[g + i]), d = dz[g + i];
          // rounded as in the mean, so that their difference vanishes where all are alike
          dx[i] += (__fmul_rn(d, weight[i]) - means[0] - x_hat * means[1]) * statistics.rstd;
          z[i] = x_hat * weight[i] + bias[i];
          if constexpr (TeamRow<G>::kAgain) {
            if (sums) {
              const bool first = tile == blockIdx.x;
              store(part_weight + column, (first ? 0.f : load<float>(part_weight + column)) + d * x_hat);
              store(part_bias + column, (first ? 0.f : load<float>(part_bias + column)) + d);
            }
          } else {
            sum_weight[g + i] += d * x_hat;
            sum_bias[g + i] += d;
          }
        }
        const int64_t to = at * call.columns + column;
        if (call.dx != nullptr) store_group<G>(static_cast<X*>(call.dx) + to, dx);
        if (call.z.data != nullptr) store_group<G>(static_cast<Z*>(call.z.data) + to, z);
      });
    });
  }
  if (sums && !TeamRow<G>::kAgain) {
    store_sums(part_weight, sum_weight, row.columns, call.columns, affine.memory);
    store_sums(part_bias, sum_bias, row.columns, call.columns, affine.memory);
  }
}

}  // namespace flamingo
