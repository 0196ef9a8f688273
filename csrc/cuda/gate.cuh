// A tanh gate in front of a residual, y = residual + tanh(gate) · x; and, per channel, its gradient and the weight's.
//
// Tiling: forward, a thread has a group of columns in kGateRows rows, whose gates it reads once; rows that follow one
// another in memory are one long row, if one gate serves all. Backward, a team of 32 to 256 threads goes along a row.
//
// Shared memory: backward [2, 32] fp32 sums of warps.
//
// Bound: bytes. Forward reads x and residual and writes y; backward reads p and weight, and writes p.
#pragma once

#include "cuda/gate.h"
#include "cuda/rows.cuh"

namespace flamingo {

constexpr int kGateThreads = 256;
constexpr int kGateRows = 8;
constexpr int kGateAtOnce = 4;  // rows on their way from memory

// Of columns column .. column + G, from `row` on.
template <int G, typename T>
FLAMINGO_DEVICE void gate_rows(const GateResidual& p, int64_t row, int64_t column) {
  float t[G];
#pragma unroll
  for (int i = 0; i < G; i++) t[i] = 1.f;
  if (p.gate.data != nullptr) {
    if (p.per_column) {
      with_elements(p.gate, [&](const auto* gates) { load_group<G>(t, gates + column); });
    } else {
      const float gate = load_number(p.gate, 0);
#pragma unroll
      for (int i = 0; i < G; i++) t[i] = gate;
    }
#pragma unroll
    for (int i = 0; i < G; i++) t[i] = tanhf(t[i]);
  }
  const auto load_row = [&](float (&x)[G], const Rows& rows, int64_t at) {
    load_group<G>(x, static_cast<const T*>(rows.data) + at * rows.stride + column);
  };
#pragma unroll 1
  for (int first = 0; first < kGateRows; first += kGateAtOnce) {
    float x[kGateAtOnce][G], residual[kGateAtOnce][G];
#pragma unroll
    for (int r = 0; r < kGateAtOnce; r++) {
      const int64_t at = row + first + r;
      if (at >= p.rows) break;
      load_row(x[r], p.x, at);
      if (p.residual.data != nullptr) load_row(residual[r], p.residual, at);
    }
#pragma unroll
    for (int r = 0; r < kGateAtOnce; r++) {
      const int64_t at = row + first + r;
      if (at >= p.rows) return;
#pragma unroll
      for (int i = 0; i < G; i++) x[r][i] = x[r][i] * t[i] + (p.residual.data != nullptr ? residual[r][i] : 0.f);
      store_group<G>(static_cast<T*>(p.y) + at * p.columns + column, x[r]);
    }
  }
}

// Occupancy: 16 warps on a multiprocessor, or more.
template <typename T, int G>
__global__ void __launch_bounds__(kGateThreads, 2) gate_residual_fwd_kernel(const GateResidual p) {
  const int64_t in_a_row = (p.columns + G - 1) / G, at = blockIdx.x * int64_t{kGateThreads} + threadIdx.x;
  const int64_t row = at / in_a_row * kGateRows, column = at % in_a_row * G;
  if (row >= p.rows) return;
  if (column + G <= p.columns) {
    gate_rows<G, T>(p, row, column);
  } else {
#pragma unroll 1
    for (int64_t rest = column; rest < p.columns; rest++) gate_rows<1, T>(p, row, rest);
  }
}

struct GateBackwardParams {
  GateBackward call;
  int team;
};

// Occupancy: 32 warps on a multiprocessor, or more.
template <typename T, int G>
__global__ void __launch_bounds__(kGateThreads, 2) gate_bwd_kernel(const GateBackwardParams params) {
  constexpr int N = 8;
  SHARED_MEMORY(float, memory);
  const GateBackward& call = params.call;
  const Team team(params.team);
  const int64_t row = blockIdx.x * int64_t{team.count} + team.index;
  const bool here = row < call.rows;
  const float t = here ? tanhf(load_number(call.gate, row)) : 0.f;
  T* const p_row = static_cast<T*>(call.p) + row * call.columns;
  const T* const weight_row = static_cast<const T*>(call.weight.data) + row * call.weight.stride;

  Columns<N, G> columns{team.rank, team.size, 0, here ? call.columns : 0};
  float sum[1] = {0.f};
#pragma unroll 1
  for (; columns.first < columns.count; columns.first += team.size * N) {
    float p[N], weight[N];
    load_columns(p, p_row, columns);
    load_columns(weight, weight_row, columns, call.step);
#pragma unroll
    for (int i = 0; i < N; i++) {
      sum[0] += p[i] * weight[i];
      p[i] *= t;
    }
    store_columns(p_row, p, columns);
  }
  TeamSums<1>{memory}(sum, team.size);
  if (here && team.rank == 0) store_number(call.dgate, row, sum[0] * (1.f - t * t));
}

}  // namespace flamingo
