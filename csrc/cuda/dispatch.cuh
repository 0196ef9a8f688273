// From a precision and a head dim known when an op is called to the instantiation of a kernel.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/attention.h"

namespace flamingo {

constexpr int kMostHeadDim = 128;

template <Precision P>
using PrecisionIs = std::integral_constant<Precision, P>;
template <int D>
using HeadDimIs = std::integral_constant<int, D>;

// Calls run(PrecisionIs<P>, HeadDimIs<D>) with the smallest D of 64, 96 and 128 that holds head_dim; the rest of a
// tile's rows is then zero.
//
// Raises: std::invalid_argument with the op's name.
template <typename Run>
void dispatch(const char* op, Precision precision, int head_dim, const Run& run) {
  const auto with = [&](auto p) {
    if (head_dim <= 64) return run(p, HeadDimIs<64>{});
    if (head_dim <= 96) return run(p, HeadDimIs<96>{});
    return run(p, HeadDimIs<128>{});
  };
  if (head_dim < 1 || head_dim > kMostHeadDim) {
    throw std::invalid_argument(std::string(op) + ": a head dim of 1 to " + std::to_string(kMostHeadDim) +
                                " was expected, got " + std::to_string(head_dim));
  }
  switch (precision) {
    case Precision::fp32:
      return with(PrecisionIs<Precision::fp32>{});
    case Precision::tf32:
      return with(PrecisionIs<Precision::tf32>{});
    case Precision::bf16:
      return with(PrecisionIs<Precision::bf16>{});
    case Precision::fp16:
      return with(PrecisionIs<Precision::fp16>{});
  }
  throw std::invalid_argument(std::string(op) + ": no precision has the code " +
                              std::to_string(static_cast<int>(precision)));
}

// Whether rows of x begin on 16 bytes, as every kernel takes them.
inline void check_view(const char* op, const char* name, const View& x, Precision precision, int head_dim) {
  const int64_t element = precision == Precision::bf16 || precision == Precision::fp16 ? 2 : 4;
  const int64_t odd =
      reinterpret_cast<uintptr_t>(x.data) | x.row * element | x.token * element | x.head * element | head_dim * element;
  if (odd % 16) {
    throw std::invalid_argument(std::string(op) + ": rows of " + name + " must begin and end on 16 bytes");
  }
}

}  // namespace flamingo
