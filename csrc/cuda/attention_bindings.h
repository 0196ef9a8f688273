// A tensor [rows, tokens or keys, heads, D] as Python passes it.
#pragma once

#include "cuda/attention.h"
#include "cuda/bindings.h"

namespace flamingo {

using ViewArg = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, strides in elements

inline View view_of(const ViewArg& arg) {
  const auto [address, row, token, head] = arg;
  return {pointer<const void>(address), row, token, head};
}

}  // namespace flamingo
