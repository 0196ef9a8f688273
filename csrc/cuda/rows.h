// What the launchers of kernels on rows take: arrays with the type of their elements. Plain C++.
#pragma once

#include <cstdint>

namespace flamingo {

enum class Element { fp32 = 0, bf16 = 1, fp16 = 2 };

// Numbers side by side; data is null where there are none.
struct Array {
  void* data;
  Element type;
};

// Rows of numbers side by side, `stride` elements from row to row; data is null where there are none.
struct Rows {
  void* data;
  Element type;
  int64_t stride;
};

}  // namespace flamingo
