// A 16 x 16 transpose of 32-bit elements with half the shuffles of at::vec's: the loads already put rows i, i + 4, i +
// 8 and i + 12 into the four 128-bit lanes of a register, which leaves a 4 x 4 transpose inside the lanes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace flamingo::AVX512 {

inline void transpose_16x16(const float* in, int64_t ld_in, float* out, int64_t ld_out) {
  const auto lanes = [&](int row, int column) {
    const float* at = in + row * ld_in + column;
    __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(at));
    x = _mm512_insertf32x4(x, _mm_loadu_ps(at + 4 * ld_in), 1);
    x = _mm512_insertf32x4(x, _mm_loadu_ps(at + 8 * ld_in), 2);
    return _mm512_insertf32x4(x, _mm_loadu_ps(at + 12 * ld_in), 3);
  };
  const auto pairs = [](__m512 a, __m512 b, bool high) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  };
  for (int column = 0; column < 16; column += 4) {
    const __m512 a = lanes(0, column), b = lanes(1, column), c = lanes(2, column), d = lanes(3, column);
    const __m512 ab_low = _mm512_unpacklo_ps(a, b), ab_high = _mm512_unpackhi_ps(a, b);
    const __m512 cd_low = _mm512_unpacklo_ps(c, d), cd_high = _mm512_unpackhi_ps(c, d);
    float* to = out + column * ld_out;
    _mm512_storeu_ps(to, pairs(ab_low, cd_low, false));
    _mm512_storeu_ps(to + ld_out, pairs(ab_low, cd_low, true));
    _mm512_storeu_ps(to + 2 * ld_out, pairs(ab_high, cd_high, false));
    _mm512_storeu_ps(to + 3 * ld_out, pairs(ab_high, cd_high, true));
  }
}

}  // namespace flamingo::AVX512
