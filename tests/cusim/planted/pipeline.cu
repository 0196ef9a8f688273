// c = a bᵀ in two stages of cp.async: [64, K] by [16, K], in bf16. A warp has 16 rows of c.
#include <memory>

#include "case.h"

namespace {

enum Mistake {
  none,
  no_barrier_before_use,
  no_barrier_before_refill,
  wrong_wait,
  no_swizzle,
  past_the_end,
  too_little_memory
};

constexpr int M = 64, N = 16, K = 256, depth = 64, threads = 128, chunks = depth / 8;
constexpr uint32_t a_bytes = M * depth * 2, stage_bytes = a_bytes + N * depth * 2;

struct Params {
  const __nv_bfloat16 *a, *b;
  float* c;
};

// Of a chunk of 16 bytes; eight rows of the same column then lie in different banks.
template <Mistake mistake>
uint32_t offset(int row, int chunk) {
  return static_cast<uint32_t>(row * depth * 2 + (mistake == no_swizzle ? chunk : chunk ^ (row % 8)) * 16);
}

template <Mistake mistake>
void issue(uint32_t to, const __nv_bfloat16* from, int rows, int k0) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * chunks; i += threads) {
    const int row = i / chunks, chunk = i % chunks;
    cusim::cp_async(to + offset<mistake>(row, chunk), from + row * K + k0 + chunk * 8, 16, 16);
  }
}

template <Mistake mistake>
__global__ void multiply(const Params p) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t start = cusim::shared_address(cusim::shared_memory());
  const auto issue_stage = [&](int step) {
    const uint32_t stage = start + step % 2 * stage_bytes;
    issue<mistake>(stage, p.a, M, step * depth);
    issue<mistake>(stage + a_bytes, p.b, N, step * depth);
  };
  float c[2][4] = {};
  issue_stage(0);
  cusim::cp_async_commit();
  for (int step = 0; step < K / depth; step++) {
    if (step + 1 < K / depth) issue_stage(step + 1);
    cusim::cp_async_commit();
    cusim::cp_async_wait(mistake == wrong_wait ? 2 : 1);
    if (mistake != no_barrier_before_use) __syncthreads();
    const uint32_t stage = start + step % 2 * stage_bytes;
    for (int k = 0; k < depth / 16; k++) {
      uint32_t a[4], b[4];
      cusim::ldmatrix_x4(a, stage + offset<mistake>(warp * 16 + lane % 16, 2 * k + lane / 16));
      cusim::ldmatrix_x4(b, stage + a_bytes + offset<mistake>(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      cusim::mma_m16n8k16<__nv_bfloat16>(c[0], a, b[0], b[1]);
      cusim::mma_m16n8k16<__nv_bfloat16>(c[1], a, b[2], b[3]);
    }
    if (mistake != no_barrier_before_refill) __syncthreads();
  }
  for (int half = 0; half < 2; half++)
    for (int i = 0; i < 4; i++) {
      const int row = warp * 16 + lane / 4 + i / 2 * 8 + (mistake == past_the_end),
                column = half * 8 + lane % 4 * 2 + i % 2;
      p.c[row * N + column] = c[half][i];
    }
}

template <Mistake mistake>
bool run() {
  alignas(128) static __nv_bfloat16 a[M * K], b[N * K];
  const auto c = std::make_unique<float[]>(M * N);
  for (int i = 0; i < M * K; i++) a[i] = static_cast<float>((i * 37 + i / 7) % 64 - 31);
  for (int i = 0; i < N * K; i++) b[i] = static_cast<float>((i * 29 + i / 5) % 32 - 15);
  const Params p{a, b, c.get()};
  const size_t bytes = 2 * stage_bytes - (mistake == too_little_memory ? 64 : 0);
  cusim::launch("multiply", dim3(1), dim3(threads), bytes, [&] { multiply<mistake>(p); });
  for (int row = 0; row < M; row++)
    for (int column = 0; column < N; column++) {
      float sum = 0;  // of whole numbers, and so exact
      for (int k = 0; k < K; k++) sum += __bfloat162float(a[row * K + k]) * __bfloat162float(b[column * K + k]);
      if (c[row * N + column] != sum) return false;
    }
  return true;
}

CASE(pipeline) { return run<none>(); }
CASE(pipeline_without_barrier_before_use) { return run<no_barrier_before_use>(); }
CASE(pipeline_without_barrier_before_refill) { return run<no_barrier_before_refill>(); }
CASE(pipeline_with_wrong_wait) { return run<wrong_wait>(); }
CASE(pipeline_without_swizzle) { return run<no_swizzle>(); }
CASE(pipeline_past_the_end) { return run<past_the_end>(); }
CASE(pipeline_in_too_little_memory) { return run<too_little_memory>(); }

}  // namespace
