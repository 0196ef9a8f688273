// What the launchers of masked cross-attention see to before anything runs.
#pragma once

#include <initializer_list>
#include <utility>

#include "cuda/dispatch.cuh"
#include "cuda/masked_cross_attention.h"

namespace flamingo {

constexpr char kMaskedOp[] = "masked_cross_attention";

// Raises: std::invalid_argument for sizes that do not fit, or that 32 bits do not hold, and for rows not on 16 bytes.
inline void check_masked(Precision precision, const MaskedSizes& size,
                         std::initializer_list<std::pair<const char*, View>> views) {
  constexpr int64_t kMost = 2147483647 - 1024;  // rows and keys are counted in 32 bits, to the end of a tile
  if (size.G < 1 || size.H < 1 || size.H % size.G || size.beams < 1 || size.B % size.beams) {
    throw std::invalid_argument(std::string(kMaskedOp) + ": heads or rows do not divide");
  }
  if (size.T * (size.H / size.G) > kMost || size.K > kMost) {
    throw std::invalid_argument(std::string(kMaskedOp) + ": more queries of a key head, or keys, than 32 bits count");
  }
  for (const auto& [name, view] : views) check_view(kMaskedOp, name, view, precision, size.D);
}

}  // namespace flamingo
