// fp32 to bf16 where the CPU has an instruction for it, to the nearest, ties to even. It is not one of those that the
// AVX-512 units are compiled for, so it is written down as such, and whoever calls this asks kRoundsToBf16 first.
#pragma once

#include <immintrin.h>

namespace flamingo::AVX512 {

// The 16 elements of `low` and behind them those of `high`.
inline __m512i round_to_bf16(__m512 low, __m512 high) {
  __m512i out;
  __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(out) : "v"(low), "v"(high));
  return out;
}

}  // namespace flamingo::AVX512
