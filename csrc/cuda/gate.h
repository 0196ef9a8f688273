// Launchers of what a tanh gate does to rows and to a weight's gradient. Asynchronous on their stream.
#pragma once

#include "cuda/rows.h"
#include "cuda/stream.h"

namespace flamingo {

// y [rows, columns] = residual + tanh(gate) · x, all of one type, y contiguous. No residual counts as 0, no gate as 1;
// `per_column`: gate has a number for each column, else it is one number.
struct GateResidual {
  int64_t rows, columns;
  Rows x, residual;
  Array gate;
  bool per_column;
  void* y;
};

// p [rows, columns], contiguous, becomes tanh(gate) · p by rows, and dgate [rows] = (1 - tanh²(gate)) · Σ p ∘ weight.
// `step`: between the columns of weight, which is of p's type.
struct GateBackward {
  int64_t rows;
  int columns;
  void* p;
  Rows weight;
  int64_t step;
  Array gate, dgate;
};

// Raise: std::invalid_argument for types that the kernels do not have, std::runtime_error where a launch fails.
void gate_residual(const GateResidual& call, Stream stream);
void gate_backward(const GateBackward& call, Stream stream);

}  // namespace flamingo
