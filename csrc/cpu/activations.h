// The activations of the feed-forward and their derivatives, on vectors.
#pragma once

#include "matrix.h"
#include "tiles.h"

namespace flamingo::CPU_CAPABILITY {

struct SquaredRelu {
  template <typename V>
  static V value(V x) {
    const V r = at::vec::clamp_min(x, V(0));
    return r * r;
  }
  template <typename V>
  static V slope(V x) {
    return at::vec::clamp_min(x, V(0)) * V(2);
  }
};

// x Φ(x), with Φ the normal distribution's; slope Φ(x) + x φ(x). In fp32, with a = |x|/√2,
//
//   Φ(-|x|) = t P(t) e^-a² / 2,  t = 1 / (1 + 0.3275911 a)        (Abramowitz and Stegun 7.1.26, error 1.5e-7)
//
// whose exponential is that of the density φ, too.
struct Gelu {
  // Φ(x) and √(2π) φ(x).
  static std::pair<Vec<float>, Vec<float>> cdf_and_bell(Vec<float> x) {
    using V = Vec<float>;
    const V a = x.abs() * V(M_SQRT1_2), bell = exp((a * a).neg());
    const V t = V(1) / at::vec::fmadd(a, V(0.3275911f), V(1));
    V p(0.5f * 1.061405429f);
    p = at::vec::fmadd(p, t, V(0.5f * -1.453152027f));
    p = at::vec::fmadd(p, t, V(0.5f * 1.421413741f));
    p = at::vec::fmadd(p, t, V(0.5f * -0.284496736f));
    p = at::vec::fmadd(p, t, V(0.5f * 0.254829592f));
    const V tail = p * t * bell;
    return {V::blendv(tail, V(1) - tail, x > V(0)), bell};
  }
  static std::pair<Vec<double>, Vec<double>> cdf_and_bell(Vec<double> x) {
    using V = Vec<double>;
    return {V(0.5) * (V(1) + (x * V(M_SQRT1_2)).erf()), exp(x * x * V(-0.5))};
  }
  template <typename V>
  static V value(V x) {
    return x * cdf_and_bell(x).first;
  }
  template <typename V>
  static V slope(V x) {
    const auto [cdf, bell] = cdf_and_bell(x);
    return at::vec::fmadd(x * V(0.5 * M_2_SQRTPI * M_SQRT1_2), bell, cdf);
  }
};

// x (1 + tanh u) / 2 with u = √(2/π) (x + 0.044715 x³).
struct GeluTanh {
  static constexpr double kBeta = M_SQRT2 * M_2_SQRTPI * 0.5, kCubic = 0.044715;
  template <typename V>
  static V tanh_u(V x) {
    return (V(kBeta) * at::vec::fmadd(V(kCubic) * x * x, x, x)).tanh();
  }
  template <typename V>
  static V value(V x) {
    return V(0.5) * x * (V(1) + tanh_u(x));
  }
  template <typename V>
  static V slope(V x) {
    const V t = tanh_u(x), du = V(kBeta) * (V(1) + V(3 * kCubic) * x * x);
    return V(0.5) * (V(1) + t) + V(0.5) * x * (V(1) - t * t) * du;
  }
};

struct Relu {
  template <typename V>
  static V value(V x) {
    return at::vec::clamp_min(x, V(0));
  }
  template <typename V>
  static V slope(V x) {
    return V::blendv(at::vec::clamp_min(x, V(0)), V(1), x > V(0));  // a NaN stays one
  }
};

// x σ(x); slope σ(x) (1 + x (1 - σ(x))).
struct Silu {
  template <typename V>
  static V sigmoid(V x) {
    return V(1) / (V(1) + exp(at::vec::clamp_max(x.neg(), V(88))));
  }
  template <typename V>
  static V value(V x) {
    return x * sigmoid(x);
  }
  template <typename V>
  static V slope(V x) {
    const V s = sigmoid(x);
    return s * (V(1) + x * (V(1) - s));
  }
};

// run(A()) with the activation's struct; kSwiglu gives Silu, which its gate half goes through.
template <typename Run>
void for_activation(Activation activation, const Run& run) {
  switch (activation) {
    case Activation::kSquaredRelu:
      return run(SquaredRelu());
    case Activation::kGelu:
      return run(Gelu());
    case Activation::kGeluTanh:
      return run(GeluTanh());
    case Activation::kRelu:
      return run(Relu());
    default:
      return run(Silu());
  }
}

// act(h) of one row: out[i] = act(out[i]), or with `up`, the other half of a swiglu, act(out[i]) · up[i].
template <typename acc_t>
void activate_row(Activation activation, acc_t* out, const acc_t* up, int64_t count) {
  using V = Vec<acc_t>;
  for_activation(activation, [&](auto act) {
    if (up) {
      map_row(out, count, [&](V a, V b) { return act.value(a) * b; }, up);
    } else {
      map_row(out, count, [&](V a) { return act.value(a); });
    }
  });
}

}  // namespace flamingo::CPU_CAPABILITY
