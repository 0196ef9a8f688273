// Launchers of activations behind a tanh gate, and their backward. Asynchronous on their stream.
#pragma once

#include "cuda/rows.h"
#include "cuda/stream.h"

namespace flamingo {

enum class Activation { identity = 0, relu = 1, squared_relu = 2, silu = 3, gelu = 4, gelu_tanh = 5, swiglu = 6 };

// a [rows, columns] = tanh(gate) · act(h), contiguous and of h's type. gate: one number, or null for 1. For swiglu, h
// [rows, 2 · columns] holds the half that is activated, then the other.
struct ActivationForward {
  Activation activation;
  int64_t rows, columns;
  Rows h;
  Array gate;
  void* a;
};

// dh = tanh(gate) · da · act'(h), a = tanh(gate) · act(h), and each block's part of Σ da · act(h), fp32. What is null
// is not written; dh may be da. dh and a are contiguous and of h's type; da is of it or fp32.
struct ActivationBackward {
  Activation activation;
  int64_t rows, columns;
  Rows da, h;
  Array gate;
  void *dh, *a;
  float* part;
};

// The blocks of activation_backward, and so its parts.
int64_t activation_blocks(int64_t rows, int64_t columns);

// Raise: std::invalid_argument for types that the kernels do not have, std::runtime_error where a launch fails.
void activation_forward(const ActivationForward& call, Stream stream);
void activation_backward(const ActivationBackward& call, Stream stream);

}  // namespace flamingo
