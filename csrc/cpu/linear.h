// What the linear ops (norm_linear, linear_gate_residual, gated_mlp, media_kv) are made of, and the pieces' arguments.
// Their host sides (<op>.cpp) put them together; the kernels (linear_*_kernel.cpp) are compiled once per ISA.
//
// `compute` is the dtype of the weights, which says how matmuls are done. Pointers without a type are arrays of the
// accumulation type: float, or double where `compute` is double.
#pragma once

#include <vector>

#include "matrix.h"

namespace flamingo {

struct Compute {
  c10::ScalarType type;
  bool narrow_tiles;  // bf16 matmuls take bf16 operands
};

// out = residual + gate ∘ (norm(x) (weight · diag(scale))ᵀ + bias); gate [N], scale [K], bias [N] and residual may be
// null. Several parts share x: their weights stand one below the other. The columns of out that `out` has no place for
// go to `rest`.
struct LinearPart {
  Matrix weight;  // [N, K]
  const void *scale = nullptr, *bias = nullptr;
  Matrix out, rest;  // [rows, N] together
};
struct LinearArgs {
  Matrix x;
  Norm norm;
  std::vector<LinearPart> parts;
  const void* gate = nullptr;
  Matrix residual;
};

// out = x + gate ∘ (act(norm(x) w_inᵀ) w_outᵀ). hidden, what the activation is applied to, is stored unless null.
struct MlpArgs {
  Matrix x;
  Norm norm;
  Matrix w_in, w_out;
  Activation activation;
  const void* gate = nullptr;
  Matrix hidden, out;
};

// dx = (gate ∘ dy) (weight · diag(scale)), the matrices of dy beside one another and the weights of the parts one below
// the other. With `hidden`, dx is multiplied by the activation's derivative there, and for swiglu has both halves.
struct InputGradientArgs {
  std::vector<Matrix> dy;
  const void* gate = nullptr;
  std::vector<LinearPart> parts;  // without bias, out and rest
  Activation activation = Activation::kNone;
  Matrix hidden, dx;
};

// P = dyᵀ z with z = act(norm(x)) (a norm or an activation, not both), the matrices of dy beside one another.
//   dweight   = gate ∘ P · diag(scale) + row_sums ⊗ bias            null: not wanted
//   row_dots    [N]: Σ_k P ∘ weight                                 null: not wanted
//   column_dots [K]: Σ_n P ∘ weight                                 null: not wanted
struct WeightGradientArgs {
  std::vector<Matrix> dy;
  Matrix x;
  Norm norm;
  Activation activation = Activation::kNone;
  Matrix weight;
  const void *gate = nullptr, *scale = nullptr, *row_sums = nullptr, *bias = nullptr;
  Matrix dweight;
  void *row_dots = nullptr, *column_dots = nullptr;
};

// From dz, the gradient of the norm's output, to those of x, of the norm's weight and of its bias; dx gets `residual`
// on top. All may be null.
struct NormBackwardArgs {
  Matrix dz, x;
  Norm norm;
  Matrix residual, dx;
  void *dweight = nullptr, *dbias = nullptr;
};

struct LinearKernels {
  void (*norm_statistics)(Compute, const Matrix& x, const Norm&);
  void (*linear)(Compute, const LinearArgs&);
  void (*mlp)(Compute, const MlpArgs&);
  void (*input_gradient)(Compute, const InputGradientArgs&);
  void (*weight_gradient)(Compute, const WeightGradientArgs&);
  void (*norm_backward)(Compute, const NormBackwardArgs&);
  void (*column_sums)(Compute, const Matrix& x, const void* factors, void* out);  // Σ_r factors[r] x[r, :]
  void (*row_dots)(Compute, const Matrix& x, const void* vector, void* out);      // x · vector
};

namespace DEFAULT {
extern const LinearKernels linear_kernels;
}
#if defined(__x86_64__)
namespace AVX2 {
extern const LinearKernels linear_kernels;
}
namespace AVX512 {
extern const LinearKernels linear_kernels;
}
#endif

}  // namespace flamingo
