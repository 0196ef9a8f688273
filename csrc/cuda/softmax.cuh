// The online softmax of a warp's 16 query rows. Scores stay in natural units; only differences of them go to base 2.
#pragma once

#include <cmath>

#include "cuda/intervals.cuh"
#include "cuda/ptx.cuh"

namespace flamingo {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

FLAMINGO_DEVICE float exp_of(float x) { return ptx::exp2(x * kLog2e); }

// A softmax's weight, at most 1: where scores are huge, the rounding of lse alone would bring more. NaN stays NaN.
FLAMINGO_DEVICE float weight(float score, float lse) {
  const float x = score - lse;
  return exp_of(x > 0 ? 0.f : x);
}

// A row's elements lie in four neighbouring lanes.
FLAMINGO_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWarp, x, 2));
}
FLAMINGO_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(kWarp, x, 1);
  return x + __shfl_xor_sync(kWarp, x, 2);
}

struct SoftmaxEnd {
  float inverse[2], lse[2];  // what o is to be multiplied by, and the log-sum-exp, of rows g and g + 8
};

template <int D>
struct Softmax {
  float acc[D / 8][4] = {};  // [16, D]: Σ p v, to be multiplied by the weights of each block of keys
  float most[2] = {-INFINITY, -INFINITY};
  float total[2] = {};  // of this lane's columns alone

  // Scores s [16, 8N] of the keys from j0 on become weights, 0 where a row does not see the key.
  template <int N>
  FLAMINGO_DEVICE void see(float (&s)[N][4], float scale, int j0, const Interval& top, const Interval& low) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Interval& row = half ? low : top;
      const bool whole = row.lo <= j0 && j0 + 8 * N <= row.hi;
      float largest = most[half];
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][2 * half + e];
          x = whole || row.sees(j0 + 8 * n + 2 * c + e) ? x * scale : -INFINITY;
          largest = fmaxf(largest, x);
        }
      }
      largest = quad_max(largest);
      const float shift = largest == -INFINITY ? 0.f : largest;  // of a row that has seen nothing yet
      const float shrink = exp_of(most[half] - shift);
      most[half] = largest;
      total[half] *= shrink;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][2 * half + e];
          x = exp_of(x - shift);
          total[half] += x;
        }
      }
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        acc[n][2 * half] *= shrink;
        acc[n][2 * half + 1] *= shrink;
      }
    }
  }

  FLAMINGO_DEVICE SoftmaxEnd finish() const {
    SoftmaxEnd end;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(total[half]);
      end.inverse[half] = sum == 0 ? 0.f : 1.f / sum;
      end.lse[half] = sum == 0 ? -INFINITY : most[half] + logf(sum);
    }
    return end;
  }
};

}  // namespace flamingo
