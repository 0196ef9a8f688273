// Launchers of LayerNorm and RMSNorm over rows, forward and backward. Asynchronous on their stream.
#pragma once

#include "cuda/rows.h"
#include "cuda/stream.h"

namespace flamingo {

// z [rows, columns] = norm(x), and copy = x where it is not null. weight and bias may be null. Where there is a branch,
// y = x + tanh(gate) · branch, and z and copy are of y in the place of x; no gate counts as 1. x, branch, y and copy
// are of one type; y, z and copy are contiguous.
struct NormForward {
  int64_t rows;
  int columns;
  Rows x, branch;
  Array gate;  // one number
  Array weight, bias;
  void* y;  // null without a branch
  Array z;
  void* copy;
  float eps;
  bool layer;  // LayerNorm, else RMSNorm
};

// dx [rows, columns] = the gradient of x, plus residual where there is one, z = norm(x), and this block's sums over
// rows of dz · x̂ and of dz, as row `block` of parts [blocks, columns], fp32. All contiguous; what is null is not
// written. dz, x, residual and dx are of one type.
struct NormBackward {
  int64_t rows;
  int columns;
  Rows dz, x, residual;
  Array weight, bias;
  void* dx;
  Array z;
  float *part_weight, *part_bias;  // both or neither
  float eps;
  bool layer;
};

// The blocks of norm_backward, and so the rows of parts, of a call whose results are not there yet. Those must begin on
// 16 bytes.
int64_t norm_backward_blocks(const NormBackward& call, bool sums, Stream stream);

// Raise: std::invalid_argument for types that the kernels do not have, std::runtime_error where a launch fails.
void norm_forward(const NormForward& call, Stream stream);
void norm_backward(const NormBackward& call, Stream stream);

}  // namespace flamingo
