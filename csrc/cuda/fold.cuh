// A norm's affine folded into the weight behind it, and the gradients of weight, scale and bias, for media_kv.
//
// Tiling: forward, a block of 32 to 256 threads goes along 16 rows (4 without groups), which share what is read of
// scale and bias. Backward, a block owns 16 columns; two of its 256 threads share a row of them, or four, where
// anything is fp32.
//
// Shared memory: forward [2, 16, 32] fp32 sums of warps; backward [8, 2, 16] of them.
//
// Bound: bytes. Forward reads weight and writes folded; backward reads p and weight, and writes dweight.
#pragma once

#include "cuda/fold.h"
#include "cuda/rows.cuh"

namespace flamingo {

constexpr int kFoldThreads = 256;
// Rows of a block.
template <int G>
constexpr int kFoldRows = G == 1 ? 4 : 16;
constexpr int kUnfoldColumns = 16;

// Occupancy: 16 warps on a multiprocessor, or more.
template <typename T, int G>
__global__ void __launch_bounds__(kFoldThreads, 2) media_kv_fwd_kernel(const Fold p) {
  constexpr int N = 8, kRows = kFoldRows<G>;
  SHARED_MEMORY(float, memory);
  const int64_t row = blockIdx.x * int64_t{kRows};
  float dots[kRows] = {};
  Columns<N, G> columns{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), 0, p.columns};
#pragma unroll 1
  for (; columns.first < p.columns; columns.first += blockDim.x * N) {
    float scale[N], bias[N];
    load_parameter(scale, p.scale, columns, 1.f);
    load_parameter(bias, p.bias, columns, 0.f);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (row + r >= p.rows) break;
      float weight[N];
      load_columns(weight, static_cast<const T*>(p.weight.data) + (row + r) * p.weight.stride, columns, p.step);
#pragma unroll
      for (int i = 0; i < N; i++) {
        dots[r] += weight[i] * bias[i];
        weight[i] *= scale[i];
      }
      store_columns(static_cast<T*>(p.folded) + (row + r) * p.columns, weight, columns);
    }
  }
  TeamSums<kRows>{memory}(dots, blockDim.x);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (row + r < p.rows) store(static_cast<T*>(p.offset) + row + r, from_float<T>(dots[r]));
    }
  }
}

// Occupancy: 24 warps on a multiprocessor, or more.
template <typename P, typename T, int G>
__global__ void __launch_bounds__(kFoldThreads, 2) media_kv_bwd_kernel(const Unfold p) {
  constexpr int N = G == 8 ? 8 : 4, kLanes = kUnfoldColumns / N, kWarps = kFoldThreads / 32;
  SHARED_MEMORY(float, memory);
  const int rank = threadIdx.x % kLanes;
  const Columns<N, G> columns{rank, kLanes, static_cast<int>(blockIdx.x) * kUnfoldColumns, p.columns};
  float scale[N], bias[N], sums[2][N] = {};  // sums of dscale and of dbias
  load_parameter(scale, p.scale, columns, 1.f);
  load_parameter(bias, p.bias, columns, 0.f);
#pragma unroll 1
  for (int64_t row = threadIdx.x / kLanes; row < p.rows; row += kFoldThreads / kLanes) {
    float product[N], weight[N];
    load_columns(product, static_cast<const P*>(p.p.data) + row * p.columns, columns);
    load_columns(weight, static_cast<const T*>(p.weight.data) + row * p.weight.stride, columns, p.step);
    const float s = load<float>(p.s + row);
#pragma unroll
    for (int i = 0; i < N; i++) {
      sums[0][i] += weight[i] * product[i];
      sums[1][i] += weight[i] * s;
      product[i] = product[i] * scale[i] + s * bias[i];
    }
    if (p.dweight != nullptr) store_columns(static_cast<T*>(p.dweight) + row * p.columns, product, columns);
  }
#pragma unroll
  for (int k = 0; k < 2; k++) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      for (int offset = 16; offset >= kLanes; offset /= 2) {
        sums[k][i] += __shfl_xor_sync(0xffffffffu, sums[k][i], offset);
      }
      const int place = (threadIdx.x / 32 * 2 + k) * kUnfoldColumns + rank * N + i;
      if (threadIdx.x % 32 < kLanes) store_shared(memory + place, sums[k][i]);
    }
  }
  __syncthreads();
  if (threadIdx.x < 2 * kUnfoldColumns) {
    const int k = threadIdx.x / kUnfoldColumns, place = threadIdx.x % kUnfoldColumns;
    const Columns<N, G> of_place{place / N, kLanes, columns.first, p.columns};
    const int column = of_place.at(place % N);
    float sum = 0.f;
    for (int warp = 0; warp < kWarps; warp++)
      sum += load_shared<float>(memory + warp * 2 * kUnfoldColumns + threadIdx.x);
    const Array& out = k == 0 ? p.dscale : p.dbias;
    if (out.data != nullptr && column < p.columns) store_number(out, column, sum);
  }
}

}  // namespace flamingo
