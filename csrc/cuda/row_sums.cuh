// Sums over the rows of parts [rows, columns], in a fixed order: the second step of a sum over all rows of something,
// whose parts the blocks of another kernel have written.
//
// Tiling: a block has 32 columns, or as many as there are if they are fewer, rounded up to a power of two; its 256
// threads take every so-manieth row of one. The blocks of up to three arrays follow one another.
//
// Shared memory: [256] fp32 sums of threads.
//
// Bound: bytes, those of the parts.
#pragma once

#include "cuda/row_sums.h"
#include "cuda/rows.cuh"

namespace flamingo {

constexpr int kRowSumsThreads = 256;
constexpr int kRowSumsColumns = 32;

struct RowSumsParams {
  RowSums call;
  int width[RowSums::kMost];  // columns of a block
  int64_t blocks[RowSums::kMost];
};

// Occupancy: 40 warps on a multiprocessor, or more.
template <int threads>
__global__ void __launch_bounds__(threads, 4) row_sums_kernel(const RowSumsParams p) {
  SHARED_MEMORY(float, memory);
  int which = 0;
  int64_t block = blockIdx.x;
  while (block >= p.blocks[which]) block -= p.blocks[which++];
  const RowSum& sum = p.call.sum[which];
  const int width = p.width[which], column = static_cast<int>(block) * width + threadIdx.x % width;

  const int64_t step = threads / width;
  float totals[4] = {};
  if (column < sum.columns) {
    for (int64_t row = threadIdx.x / width; row < sum.rows; row += 4 * step) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int64_t at = row + i * step;
        if (at < sum.rows) totals[i] += load<float>(sum.part + at * sum.columns + column);
      }
    }
  }
  float total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
  store_shared(memory + threadIdx.x, total);
  for (int half = threads / 2; half >= width; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) {
      total += load_shared<float>(memory + threadIdx.x + half);
      store_shared(memory + threadIdx.x, total);
    }
  }
  if (static_cast<int>(threadIdx.x) < width && column < sum.columns) {
    if (sum.gate.data != nullptr) {
      const float t = tanhf(load_number(sum.gate, 0));
      total *= 1.f - t * t;
    }
    store_number(sum.out, column, total);
  }
}

}  // namespace flamingo
