// What the attention launchers take from Python. Plain C++; sizes in the letters of docs/design.md.
#pragma once

#include <cstdint>

namespace flamingo {

// How products are made: in the elements' own format, or of fp32 elements in tf32.
enum class Precision { fp32 = 0, tf32 = 1, bf16 = 2, fp16 = 3 };

// A tensor [rows, tokens or keys, heads, D] with its strides in elements; D lies in one piece. Rows of D elements begin
// on 16 bytes, and so D · sizeof(element) is a multiple of 16.
struct View {
  const void* data;
  int64_t row, token, head;
};

}  // namespace flamingo
