// Launchers of a norm's affine folded into the weight behind it, and of the gradients of both: what media_kv.py is made
// of. Asynchronous on their stream.
#pragma once

#include "cuda/rows.h"
#include "cuda/stream.h"

namespace flamingo {

// folded [rows, columns] = weight · scale and offset [rows] = weight bias, contiguous and of weight's type.
// `step`: between the columns of weight.
struct Fold {
  int64_t rows;
  int columns;
  Rows weight;
  int64_t step;
  Array scale, bias;
  void *folded, *offset;
};

// dweight = p · scale + s biasᵀ, dscale = Σ p ∘ weight and dbias = Σ weight · s over the rows, of p [rows, columns],
// contiguous, and s [rows] fp32. What is null is not written. dweight is contiguous, of weight's type, and may be p.
// p is of weight's type, or fp32.
struct Unfold {
  int64_t rows;
  int columns;
  Array p;
  const float* s;
  Rows weight;
  int64_t step;
  Array scale, bias;
  void* dweight;
  Array dscale, dbias;
};

// Raise: std::invalid_argument for types that the kernels do not have, std::runtime_error where a launch fails.
void fold(const Fold& call, Stream stream);
void unfold(const Unfold& call, Stream stream);

}  // namespace flamingo
