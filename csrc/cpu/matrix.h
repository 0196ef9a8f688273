// What the linear ops hand to their kernels: matrices in memory, and the norm of their rows.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace flamingo {

// A row-major matrix in memory; `ld` is the distance of its rows in elements. data is null where nothing is there.
struct Matrix {
  void* data = nullptr;
  c10::ScalarType type = c10::ScalarType::Float;
  int64_t rows = 0, columns = 0, ld = 0;

  explicit operator bool() const { return data != nullptr; }
};

enum class NormKind { kNone, kLayer, kRms };

// x̂ = (x - mean)·rstd, then weight·x̂ + bias where those are not null. All arrays are of the accumulation type; mean and
// rstd have an element per row and are filled by `norm_statistics`.
struct Norm {
  NormKind kind = NormKind::kNone;
  double eps = 0;
  void *mean = nullptr, *rstd = nullptr;
  const void *weight = nullptr, *bias = nullptr;
};

enum class Activation { kNone, kSquaredRelu, kGelu, kGeluTanh, kRelu, kSilu, kSwiglu };

}  // namespace flamingo
