// An activation and a tanh gate between two matmuls, forward and backward: a = tanh(gate) · act(h).
//
// Tiling: 256 threads of a block share kActivationTile elements in a row, groups of G at a time. Rows that follow one
// another in memory are one long row.
//
// Shared memory: backward [2, 32] fp32 sums of warps.
//
// Bound: bytes. Forward reads h and writes a; backward reads da and h, writes dh and a. The smooth activations take
// some 40 operations an element, less than a multiprocessor does in the time of its bytes.
#pragma once

#include "cuda/activation.h"
#include "cuda/rows.cuh"

namespace flamingo {

constexpr int kActivationThreads = 256;
constexpr int kActivationTile = 4096;

// act(h) and act'(h); a NaN stays one. The equations are those of the public op gated_mlp; swiglu is silu here.
template <Activation activation>
FLAMINGO_DEVICE void activate(float h, float& a, float& slope) {
  if constexpr (activation == Activation::identity) {
    a = h;
    slope = 1.f;
  } else if constexpr (activation == Activation::relu) {
    a = h < 0.f ? 0.f : h;
    slope = h > 0.f ? 1.f : h <= 0.f ? 0.f : h;
  } else if constexpr (activation == Activation::squared_relu) {
    const float r = h < 0.f ? 0.f : h;
    a = r * r;
    slope = 2.f * r;
  } else if constexpr (activation == Activation::silu) {
    const float s = 1.f / (1.f + expf(-h));
    a = h * s;
    slope = s * (1.f + h * (1.f - s));
  } else if constexpr (activation == Activation::gelu) {
    constexpr float kSqrtHalf = 0.7071067811865476f, kDensity = 0.3989422804014327f;  // √½, 1 / √(2π)
    const float cdf = 0.5f * (1.f + erff(h * kSqrtHalf));
    a = h * cdf;
    slope = cdf + h * expf(-0.5f * h * h) * kDensity;
  } else {
    static_assert(activation == Activation::gelu_tanh);
    constexpr float kBeta = 0.7978845608028654f;  // √(2/π)
    // beyond 10, act and its slope are their limits to the last bit, and h³ may overflow
    const float c = h > 10.f ? 10.f : h < -10.f ? -10.f : h;
    const float t = tanhf((c + 0.044715f * c * c * c) * kBeta);
    a = 0.5f * h * (1.f + t);
    slope = 0.5f * (1.f + t + c * (1.f - t * t) * (1.f + 0.134145f * c * c) * kBeta);
  }
}

template <int G>
FLAMINGO_DEVICE void activate(Activation activation, const float (&h)[G], float (&a)[G], float (&slope)[G]) {
  const auto all = [&](auto constant) {
#pragma unroll
    for (int i = 0; i < G; i++) activate<constant.value>(h[i], a[i], slope[i]);
  };
#define FLAMINGO_CASE(name) \
  case Activation::name:    \
    return all(std::integral_constant<Activation, Activation::name>{})
  switch (activation) {
    FLAMINGO_CASE(identity);
    FLAMINGO_CASE(relu);
    FLAMINGO_CASE(squared_relu);
    FLAMINGO_CASE(gelu);
    FLAMINGO_CASE(gelu_tanh);
    FLAMINGO_CASE(silu);
    case Activation::swiglu:
      return all(std::integral_constant<Activation, Activation::silu>{});
  }
#undef FLAMINGO_CASE
}

// f(row, column, group) for all groups of a thread, group an integral_constant: G, or 1 for what is left of the last.
template <int G, typename F>
FLAMINGO_DEVICE void each_group_of_tile(int64_t rows, int64_t columns, F f) {
  const int64_t elements = rows * columns, first = blockIdx.x * int64_t{kActivationTile};
#pragma unroll 1
  for (int i = threadIdx.x * G; i < kActivationTile; i += kActivationThreads * G) {
    const int64_t at = first + i;
    if (at >= elements) return;
    int64_t row = 0;
    if (rows > 1)
      row = elements <= UINT32_MAX ? static_cast<uint32_t>(at) / static_cast<uint32_t>(columns) : at / columns;
    const int64_t column = at - row * columns;
    if (column + G <= columns) {
      f(row, column, std::integral_constant<int, G>{});
    } else {
#pragma unroll 1
      for (int64_t rest = column; rest < columns; rest++) f(row, rest, std::integral_constant<int, 1>{});
    }
  }
}

FLAMINGO_DEVICE float scalar_gate(const Array& gate) {
  return gate.data == nullptr ? 1.f : tanhf(load_number(gate, 0));
}

// Occupancy: 32 warps on a multiprocessor, or more.
template <typename T, int G>
__global__ void __launch_bounds__(kActivationThreads, 4) activation_fwd_kernel(const ActivationForward p) {
  const float t = scalar_gate(p.gate);
  each_group_of_tile<G>(p.rows, p.columns, [&](int64_t row, int64_t column, auto group) {
    constexpr int n = decltype(group)::value;
    const T* const from = static_cast<const T*>(p.h.data) + row * p.h.stride + column;
    float h[n], a[n], slope[n];
    load_group<n>(h, from);
    activate(p.activation, h, a, slope);
    if (p.activation == Activation::swiglu) {
      load_group<n>(h, from + p.columns);
#pragma unroll
      for (int i = 0; i < n; i++) a[i] *= h[i];
    }
#pragma unroll
    for (int i = 0; i < n; i++) a[i] *= t;
    store_group<n>(static_cast<T*>(p.a) + row * p.columns + column, a);
  });
}

// Occupancy: 24 warps on a multiprocessor, or more.
template <typename T, typename D, int G>
__global__ void __launch_bounds__(kActivationThreads, 3) activation_bwd_kernel(const ActivationBackward p) {
  const float t = scalar_gate(p.gate);
  const bool swiglu = p.activation == Activation::swiglu;
  float sum[1] = {0.f};
  each_group_of_tile<G>(p.rows, p.columns, [&](int64_t row, int64_t column, auto group) {
    constexpr int n = decltype(group)::value;
    const T* const from = static_cast<const T*>(p.h.data) + row * p.h.stride + column;
    float h[n], da[n], a[n], slope[n];
    load_group<n>(h, from);
    load_group<n>(da, static_cast<const D*>(p.da.data) + row * p.da.stride + column);
    activate(p.activation, h, a, slope);
    float other[n];  // the gradient of the half that is not activated
    if (swiglu) {
      load_group<n>(h, from + p.columns);
#pragma unroll
      for (int i = 0; i < n; i++) {
        other[i] = t * da[i] * a[i];
        slope[i] *= h[i];
        a[i] *= h[i];
      }
    }
#pragma unroll
    for (int i = 0; i < n; i++) {
      sum[0] += da[i] * a[i];
      slope[i] *= t * da[i];
      a[i] *= t;
    }
    if (p.dh != nullptr) {
      T* const dh = static_cast<T*>(p.dh) + (swiglu ? 2 : 1) * row * p.columns + column;
      store_group<n>(dh, slope);
      if (swiglu) store_group<n>(dh + p.columns, other);
    }
    if (p.a != nullptr) store_group<n>(static_cast<T*>(p.a) + row * p.columns + column, a);
  });
  if (p.part != nullptr) {
    SHARED_MEMORY(float, memory);
    TeamSums<1>{memory}(sum, kActivationThreads);
    if (threadIdx.x == 0) store(p.part + blockIdx.x, sum[0]);
  }
}

}  // namespace flamingo
