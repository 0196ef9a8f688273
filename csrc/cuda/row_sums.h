// Launcher of sums over the rows of up to three arrays at once. Asynchronous on its stream.
#pragma once

#include "cuda/rows.h"
#include "cuda/stream.h"

namespace flamingo {

// out [columns] = Σ over the rows of part [rows, columns], fp32; multiplied by 1 - tanh²(gate) where there is a gate,
// of one number.
struct RowSum {
  const float* part;
  int64_t rows;
  int columns;
  Array out, gate;
};

struct RowSums {
  static constexpr int kMost = 3;
  RowSum sum[kMost];
  int count;
};

// Raises: std::runtime_error where the launch fails.
void row_sums(const RowSums& call, Stream stream);

}  // namespace flamingo
