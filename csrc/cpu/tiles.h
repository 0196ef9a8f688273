// Building blocks of the CPU kernels, for the ISA of the including unit: vector exp, rows and transposes into matmul
// layout, and the matmul itself. A tile is a small row-major matrix in scratch memory that stays in cache.
//
// `tile_t` is the type of matmul operands: float (also for fp16 inputs, and for bf16 where the CPU has no bf16
// multiply), BFloat16, or double. Matmuls accumulate in `accumulate_t<tile_t>`. For BFloat16 the right operand has the
// VNNI layout [k/2][n][2], in which a pair of rows is interleaved, as oneDNN's brgemm wants it.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "matmul_fp64.h"
#include "scratch.h"
#if defined(CPU_CAPABILITY_AVX512)
#include "bf16_avx512.h"
#include "isa.h"
#include "transpose_avx512.h"
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace flamingo::CPU_CAPABILITY {

template <typename tile_t>
using accumulate_t = std::conditional_t<std::is_same_v<tile_t, double>, double, float>;

template <typename acc_t>
using Vec = at::vec::Vectorized<acc_t>;

template <typename tile_t>
constexpr bool is_vnni = std::is_same_v<tile_t, at::BFloat16>;

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// ---- memory ---------------------------------------------------------------------------------------------------------

// Hands out 64-byte aligned pieces of one allocation. Two passes with the same calls: the first only counts, and gives
// null.
class Arena {
 public:
  template <typename T>
  T* take(int64_t count) {
    const int64_t begin = used_, end = begin + count * static_cast<int64_t>(sizeof(T));
    used_ = round_up(end + kBetweenPieces, 64);
    if (!base_) return nullptr;
    forbid(base_ + end, base_ + used_);
    return reinterpret_cast<T*>(base_ + begin);
  }
  void allocate() {
    base_ = static_cast<char*>(take_scratch(used_));
    used_ = 0;
  }
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    if (base_) give_scratch(base_);
  }

 private:
  // AddressSanitizer is to see what leaves its piece, and not only what leaves the allocation.
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kBetweenPieces = 64;
  static void forbid(const char* begin, const char* end) { __asan_poison_memory_region(begin, end - begin); }
#else
  static constexpr int64_t kBetweenPieces = 0;
  static void forbid(const char*, const char*) {}
#endif

  char* base_ = nullptr;
  int64_t used_ = 0;
};

// ---- exp ------------------------------------------------------------------------------------------------------------

// exp(x) for x <= 88, exactly 0 below -88 and for -inf; NaN stays NaN. e^x = 2^n e^r with |r| <= ln2/2: adding 1.5·2^23
// rounds x/ln2 to the integer n and leaves n + 127, the exponent of 2^n, in the low bits; it is 0 at the lowest x, and
// so is 2^n then. The polynomial is the minimax fit of degree 6 (relative error 3e-9). n·ln2 is rounded once, so the
// relative error grows to |x|·4e-8; in a softmax, whose largest term is e^0, that stays below half an ulp of the sum.
inline Vec<float> exp(Vec<float> x) {
  const Vec<float> magic(12582912.f + 127.f);
  x = at::vec::clamp_min(x, Vec<float>(-88.03f));
  const Vec<float> t = at::vec::fmadd(x, Vec<float>(1.44269504f), magic);
  const Vec<float> r = at::vec::fmadd(t - magic, Vec<float>(-0.693147181f), x);
  Vec<float> p(1.3814537894e-3f);
  p = at::vec::fmadd(p, r, Vec<float>(8.3687453201e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(4.1668390831e-2f));
  p = at::vec::fmadd(p, r, Vec<float>(1.6666520397e-1f));
  p = at::vec::fmadd(p, r, Vec<float>(4.9999993432e-1f));
  p = at::vec::fmadd(p, r * r, r) + Vec<float>(1.f);
  return p * at::vec::cast<float>(at::vec::cast<int32_t>(t) << Vec<int32_t>(23));
}

inline Vec<double> exp(Vec<double> x) { return x.exp(); }

template <typename acc_t>
inline acc_t sum(Vec<acc_t> x) {
  return at::vec::vec_reduce_all<acc_t>([](Vec<acc_t>& a, Vec<acc_t>& b) { return a + b; }, x);
}

// Maximum, where a NaN may win or lose: one instruction, unlike at::vec::maximum.
template <typename acc_t>
inline Vec<acc_t> larger(Vec<acc_t> a, Vec<acc_t> b) {
  return at::vec::clamp_min(b, a);
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Two vectors, the unit of every elementwise loop: as many elements as one vector of a 16-bit type holds.
template <typename acc_t>
constexpr int64_t kStep = 2 * Vec<acc_t>::size();

// Two vectors as one of a 16-bit type.
template <typename out_t>
inline at::vec::Vectorized<out_t> narrow(Vec<float> a, Vec<float> b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<out_t, at::BFloat16>) {
    if (kRoundsToBf16) return round_to_bf16(a, b);
  }
#endif
  return at::vec::convert_from_float<out_t>(a, b);
}

template <typename out_t, typename acc_t>
inline void store_step(out_t* out, Vec<acc_t> a, Vec<acc_t> b) {
  if constexpr (std::is_same_v<out_t, acc_t>) {
    a.store(out);
    b.store(out + Vec<acc_t>::size());
  } else {
    narrow<out_t>(a, b).store(out);
  }
}

template <typename out_t, typename acc_t>
inline void store_half_step(out_t* out, Vec<acc_t> a) {
  if constexpr (std::is_same_v<out_t, acc_t>) {
    a.store(out);
  } else {
    narrow<out_t>(a, a).store(out, Vec<acc_t>::size());
  }
}

template <typename acc_t, typename in_t>
inline void load_step(const in_t* in, Vec<acc_t>& a, Vec<acc_t>& b) {
  if constexpr (std::is_same_v<in_t, acc_t>) {
    a = Vec<acc_t>::loadu(in);
    b = Vec<acc_t>::loadu(in + Vec<acc_t>::size());
  } else {
    std::tie(a, b) = at::vec::convert_to_float<in_t>(at::vec::Vectorized<in_t>::loadu(in));
  }
}

// out[i] = in[i] for i < count, 0 up to `padded`.
template <typename out_t, typename in_t>
inline void copy_row(out_t* out, const in_t* in, int64_t count, int64_t padded) {
  if constexpr (std::is_same_v<out_t, in_t>) {
    if (count > 0) std::memcpy(out, in, count * sizeof(in_t));  // of nothing, either may be null
  } else {
    using acc_t = accumulate_t<out_t>;
    int64_t i = 0;
    for (Vec<acc_t> a, b; i + kStep<acc_t> <= count; i += kStep<acc_t>) {
      load_step<acc_t>(in + i, a, b);
      store_step(out + i, a, b);
    }
    for (; i < count; ++i) out[i] = static_cast<out_t>(static_cast<acc_t>(in[i]));
  }
  if (count < padded) std::memset(static_cast<void*>(out + count), 0, (padded - count) * sizeof(out_t));
}

// out = factor · in, narrowed.
template <typename out_t, typename acc_t>
inline void scale_row(out_t* out, const acc_t* in, int64_t count, acc_t factor) {
  const Vec<acc_t> f(factor);
  int64_t i = 0;
  for (; i + kStep<acc_t> <= count; i += kStep<acc_t>) {
    store_step(out + i, Vec<acc_t>::loadu(in + i) * f, Vec<acc_t>::loadu(in + i + Vec<acc_t>::size()) * f);
  }
  for (; i < count; ++i) out[i] = static_cast<out_t>(in[i] * factor);
}

// out += factor · in.
template <typename acc_t>
inline void add_scaled_row(acc_t* out, const acc_t* in, int64_t count, acc_t factor) {
  const Vec<acc_t> f(factor);
  int64_t i = 0;
  for (; i + Vec<acc_t>::size() <= count; i += Vec<acc_t>::size()) {
    at::vec::fmadd(Vec<acc_t>::loadu(in + i), f, Vec<acc_t>::loadu(out + i)).store(out + i);
  }
  for (; i < count; ++i) out[i] += in[i] * factor;
}

template <typename acc_t, typename in_t>
inline acc_t dot_row(const in_t* x, const in_t* y, int64_t count) {
  Vec<acc_t> total(0), xa, xb, ya, yb;
  int64_t i = 0;
  for (; i + kStep<acc_t> <= count; i += kStep<acc_t>) {
    load_step<acc_t>(x + i, xa, xb);
    load_step<acc_t>(y + i, ya, yb);
    total = at::vec::fmadd(xa, ya, at::vec::fmadd(xb, yb, total));
  }
  acc_t result = sum(total);
  for (; i < count; ++i) result += static_cast<acc_t>(x[i]) * static_cast<acc_t>(y[i]);
  return result;
}

// NaN if a row holds an infinity or a NaN, else 0.
template <typename acc_t, typename in_t>
inline acc_t poison_of_row(const in_t* x, int64_t count) {
  const Vec<acc_t> zero(0);
  Vec<acc_t> total(0), a, b;
  int64_t i = 0;
  for (; i + kStep<acc_t> <= count; i += kStep<acc_t>) {
    load_step<acc_t>(x + i, a, b);
    total = at::vec::fmadd(a, zero, at::vec::fmadd(b, zero, total));
  }
  acc_t result = sum(total);
  for (; i < count; ++i) result += static_cast<acc_t>(x[i]) * acc_t(0);
  return result;
}

// Rows of memory that will be read, or overwritten, soon. A few are asked for after each slice of other work, which
// hides their latency; asked for at once they would fill the miss buffers and hold up that work.
template <typename T>
class Ahead {
 public:
  Ahead(int64_t slices, int64_t row_length) : slices_(slices), row_length_(row_length) {}

  void add(const T* rows, int64_t ld, int64_t count, bool write = false) { parts_[used_++] = {rows, ld, count, write}; }

  // To be called after `slices` of the work.
  void fetch(int64_t slices) {
    const int64_t next = std::min(done_ + slices, slices_);
    for (int part = 0; part < used_; ++part) {
      const auto& [rows, ld, count, write] = parts_[part];
      for (int64_t r = count * done_ / slices_; r < count * next / slices_; ++r) {
        for (int64_t i = 0; i < row_length_; i += 64 / static_cast<int64_t>(sizeof(T))) {
          if (write) {
            __builtin_prefetch(rows + r * ld + i, /*rw=*/1, /*locality=*/2);
          } else {
            __builtin_prefetch(rows + r * ld + i, /*rw=*/0, /*locality=*/2);
          }
        }
      }
    }
    done_ = next;
  }

 private:
  struct Part {
    const T* rows;
    int64_t ld, count;
    bool write;
  };
  Part parts_[8];
  int used_ = 0;
  int64_t done_ = 0;
  const int64_t slices_, row_length_;
};

// ---- matmul layouts -------------------------------------------------------------------------------------------------

template <int kBlock, typename T>
inline void transpose_block(const T* in, int64_t ld_in, T* out, int64_t ld_out) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float> && kBlock == 16) return transpose_16x16(in, ld_in, out, ld_out);
#endif
  at::vec::transpose_mxn<T, kBlock, kBlock>(in, ld_in, out, ld_out);
}

// out [columns, ld_out] = in [rows, columns] transposed, with zeros in the columns rows .. padded of out.
template <int kBlock, typename T>
inline void transpose_blocks(T* out, int64_t ld_out, const T* in, int64_t ld_in, int64_t rows, int64_t columns,
                             int64_t padded) {
  int64_t r = 0;
  for (; r + kBlock <= rows; r += kBlock) {
    int64_t c = 0;
    for (; c + kBlock <= columns; c += kBlock) {
      transpose_block<kBlock>(in + r * ld_in + c, ld_in, out + c * ld_out + r, ld_out);
    }
    for (; c < columns; ++c) {
      for (int64_t i = r; i < r + kBlock; ++i) out[c * ld_out + i] = in[i * ld_in + c];
    }
  }
  for (int64_t c = 0; c < columns && r < padded; ++c) {
    for (int64_t i = r; i < padded; ++i) out[c * ld_out + i] = i < rows ? in[i * ld_in + c] : T(0);
  }
}

// The transpose of a [rows, columns] tile as a right operand [columns, ld_out] of a matmul; columns is even for VNNI.
// A pair of BFloat16 moves as one 32-bit element.
template <typename tile_t>
inline void transpose_right(tile_t* out, int64_t ld_out, const tile_t* in, int64_t ld_in, int64_t rows, int64_t columns,
                            int64_t padded) {
  if constexpr (is_vnni<tile_t>) {
    transpose_blocks<16>(reinterpret_cast<float*>(out), ld_out, reinterpret_cast<const float*>(in), ld_in / 2, rows,
                         columns / 2, padded);
  } else {
    transpose_blocks<16>(out, ld_out, in, ld_in, rows, columns, padded);
  }
}

// oneDNN takes larger leading dimensions for 32-bit ones.
constexpr int64_t kMostLeading = 1 << 24;

// Whether brgemm takes rows of memory as they lie; not those of an expanded tensor, say.
inline bool fits_matmul(int64_t ld, int64_t columns) { return columns <= ld && ld <= kMostLeading; }

// Rows so far apart, by a multiple of 8 KiB, share so few sets of a cache that they throw each other out.
inline bool share_sets(int64_t ld_bytes) { return ld_bytes % 8192 == 0; }

// [rows, columns] of memory as a right operand [padded, columns] of a matmul, with zeros in the rows past `rows`;
// padded is even for VNNI. The memory itself where it has that form, else a copy in `out`.
template <typename tile_t, typename in_t>
inline std::pair<const tile_t*, int64_t> rows_right(tile_t* out, const in_t* in, int64_t ld_in, int64_t rows,
                                                    int64_t columns, int64_t padded) {
  if constexpr (std::is_same_v<tile_t, in_t> && !is_vnni<tile_t>) {
    if (rows == padded && fits_matmul(ld_in, columns) && !share_sets(ld_in * sizeof(in_t))) return {in, ld_in};
  }
  if constexpr (is_vnni<tile_t>) {
    const auto* source = reinterpret_cast<const uint16_t*>(in);
    auto* pairs = reinterpret_cast<uint32_t*>(out);
    int64_t r = 0;
    for (; r + 1 < rows; r += 2, pairs += columns) {
      const uint16_t *low = source + r * ld_in, *high = low + ld_in;
      for (int64_t c = 0; c < columns; ++c) pairs[c] = low[c] | static_cast<uint32_t>(high[c]) << 16;
    }
    if (r < rows) {
      for (int64_t c = 0; c < columns; ++c) pairs[c] = source[r * ld_in + c];
      r += 2;
      pairs += columns;
    }
    if (r < padded) std::memset(pairs, 0, (padded - r) * columns * sizeof(tile_t));
  } else {
    for (int64_t r = 0; r < rows; ++r) copy_row(out + r * columns, in + r * ld_in, columns, columns);
    if (rows < padded) std::memset(out + rows * columns, 0, (padded - rows) * columns * sizeof(tile_t));
  }
  return {out, columns};
}

// [rows, columns] of memory as a tile whose rows have an even length for VNNI (`padded`, zeros past `columns`): the
// memory itself where it has that form, else a copy in `stage`.
template <typename tile_t, typename in_t>
inline std::pair<const tile_t*, int64_t> rows_left(tile_t* stage, const in_t* in, int64_t ld_in, int64_t rows,
                                                   int64_t columns, int64_t padded) {
  if constexpr (std::is_same_v<tile_t, in_t>) {
    const bool pairs_aligned = ld_in % 2 == 0 && reinterpret_cast<uintptr_t>(in) % (2 * sizeof(in_t)) == 0;
    if (columns == padded && fits_matmul(ld_in, columns) && (!is_vnni<tile_t> || pairs_aligned)) return {in, ld_in};
  }
  for (int64_t r = 0; r < rows; ++r) copy_row(stage + r * padded, in + r * ld_in, columns, padded);
  return {stage, padded};
}

// Lane i of the result combines the lanes of vector i of `in`, which holds as many vectors as a vector has lanes; both
// are clobbered. Cheaper than reducing each vector by itself, and no reduction waits for another.
template <typename acc_t, typename Combine>
inline Vec<acc_t> reduce_each(const acc_t* in, acc_t* scratch, const Combine& combine) {
  constexpr int size = Vec<acc_t>::size();
  transpose_block<size>(in, size, scratch, size);
  Vec<acc_t> total = Vec<acc_t>::loadu(scratch);
  for (int i = 1; i < size; ++i) total = combine(total, Vec<acc_t>::loadu(scratch + i * size));
  return total;
}

// ---- matmul ---------------------------------------------------------------------------------------------------------

// c [m, n] (+)= a [m, k] · b [k, n]. oneDNN generates a kernel per shape, thread and leading dimensions (0.1 ms each),
// so callers round shapes to few values.
inline void matmul(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                   int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, false);
}
inline void matmul(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b,
                   int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, true);
}
inline void matmul(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb,
                   double* c, int64_t ldc, bool accumulate) {
  matmul_fp64(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

// The same a few rows at a time, asking for memory ahead in between; a row of c is a slice of the work.
template <typename tile_t, typename in_t>
inline void matmul(int64_t m, int64_t n, int64_t k, const tile_t* a, int64_t lda, const tile_t* b, int64_t ldb,
                   accumulate_t<tile_t>* c, int64_t ldc, bool accumulate, Ahead<in_t>& ahead) {
  constexpr int64_t kRows = 16;
  for (int64_t r = 0; r < m; r += kRows) {
    const int64_t rows = std::min(kRows, m - r);
    matmul(rows, n, k, a + r * lda, lda, b, ldb, c + r * ldc, ldc, accumulate);
    ahead.fetch(rows);
  }
}

// What a thread that ran VNNI matmuls owes the hardware (AMX tile state).
template <typename tile_t>
inline void release_matmul() {
  if constexpr (is_vnni<tile_t>) at::native::cpublas::brgemm_release(true);
}

}  // namespace flamingo::CPU_CAPABILITY
