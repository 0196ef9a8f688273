// The matmul of a few rows with a weight, as in decoding. Packing the weight, as gemm.h does, would cost more than all
// the rest. So each of its rows is read once, as it lies, for dot products with all rows of the left; what that costs
// is the weight's way from memory.
#pragma once

#include <vector>

#include "operands.h"

namespace flamingo::CPU_CAPABILITY {

constexpr int64_t kFewRows = 8, kFewColumns = 64;  // rows at most; columns of a tile

constexpr int kTogether = 4;  // rows of the weight, and at most of the left, whose dot products are taken together

// total[kTogether · r + i] += the products of x's row r and of w[i], elementwise, `count` of each. Memory is asked for
// 3 KiB ahead: in w[i] and, behind its end, in next[i].
template <int kRows, typename acc_t, typename w_t>
void add_products(const w_t* const* w, const w_t* const* next, const acc_t* x, int64_t ld, int64_t count,
                  Vec<acc_t>* total) {
  using V = Vec<acc_t>;
  constexpr int64_t kAhead = 3072 / sizeof(w_t), kLine = 64 / sizeof(w_t);
  V sums[kRows][kTogether];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kTogether; ++i) sums[r][i] = total[kTogether * r + i];
  }
  const auto add = [&](int i, const w_t* of_w, const acc_t* of_x) __attribute__((always_inline)) {
    V a, b;
    load_step<acc_t>(of_w, a, b);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      sums[r][i] = at::vec::fmadd(a, V::loadu(of_x + r * ld), sums[r][i]);
      sums[r][i] = at::vec::fmadd(b, V::loadu(of_x + r * ld + V::size()), sums[r][i]);
    }
  };
  const int64_t whole = count / kStep<acc_t> * kStep<acc_t>;
  const auto add_run = [&](int64_t begin, int64_t end, const w_t* const* ahead, int64_t offset) {
    for (int64_t at = begin; at < end; at += kStep<acc_t>) {
#pragma GCC unroll 16
      for (int i = 0; i < kTogether; ++i) {
        for (int64_t line = 0; line < kStep<acc_t>; line += kLine) __builtin_prefetch(ahead[i] + offset + at + line);
        add(i, w[i] + at, x + at);
      }
    }
  };
  const int64_t near_end = std::max<int64_t>(whole - kAhead, 0) / kStep<acc_t> * kStep<acc_t>;
  add_run(0, near_end, w, kAhead);
  add_run(near_end, whole, next, -near_end);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kTogether; ++i) total[kTogether * r + i] = sums[r][i];
  }
  for (int64_t at = whole; at < count; at += V::size()) {
    const int64_t left = std::min<int64_t>(V::size(), count - at);
    for (int i = 0; i < kTogether; ++i) {
      acc_t rest[V::size()];
      copy_row(rest, w[i] + at, left, V::size());
      for (int r = 0; r < kRows; ++r) {
        V& sum = total[kTogether * r + i];
        sum = at::vec::fmadd(V::loadu(rest), V::loadu(x + r * ld + at, left), sum);
      }
    }
  }
}

// The same for 1 .. kTogether rows of x.
template <typename acc_t, typename w_t>
void add_products(int64_t rows, const w_t* const* w, const w_t* const* next, const acc_t* x, int64_t ld, int64_t count,
                  Vec<acc_t>* total) {
  switch (rows) {
    case 1:
      return add_products<1>(w, next, x, ld, count, total);
    case 2:
      return add_products<2>(w, next, x, ld, count, total);
    case 3:
      return add_products<3>(w, next, x, ld, count, total);
    default:
      return add_products<kTogether>(w, next, x, ld, count, total);
  }
}

// totals[kTogether · r + i] = the products of x's row r, of `depth` elements, and of row first + min(i, rows - 1) of
// the source.
template <typename acc_t, typename Source>
void multiply_rows(const Source& source, int64_t first, int64_t rows, const std::vector<acc_t>& x, int64_t few,
                   int64_t depth, acc_t* wide, Vec<acc_t>* totals) {
  std::fill_n(totals, few * kTogether, Vec<acc_t>(0));
  const auto row_of = [&](int64_t i) { return first + std::min(i, rows - 1); };
  for_type(source.type(), [&](auto example) {
    using w_t = decltype(example);
    if constexpr (std::is_same_v<w_t, acc_t> || (std::is_same_v<acc_t, float> && !std::is_same_v<w_t, double>)) {
      const w_t *w[kTogether], *next[kTogether];
      for (int64_t i = 0; i < kTogether; ++i) {
        w[i] = source.template memory<w_t>(row_of(i), 0);
        next[i] = w[i] + kTogether * source.ld();
      }
      for (int64_t r = 0; w[0] && r < few; r += kTogether) {
        add_products(few - r, w, next, x.data() + r * depth, depth, depth, totals + r * kTogether);
      }
      if (w[0]) return;
    }
    for (int64_t k = 0; k < depth; k += kMostDepth) {
      const int64_t count = std::min(kMostDepth, depth - k);
      const acc_t* w[kTogether];
      for (int64_t i = 0; i < kTogether; ++i) {
        source.load(row_of(i), k, count, wide + i * kMostDepth);
        w[i] = wide + i * kMostDepth;
      }
      for (int64_t r = 0; r < few; r += kTogether) {
        add_products(few - r, w, w, x.data() + r * depth + k, depth, count, totals + r * kTogether);
      }
    }
  });
}

// As multiply, where column j of R is row j of `source`; tiles are kFewColumns wide.
template <typename tile_t, typename Source, typename Epilogue>
void multiply_few(const Left<tile_t>& left, int64_t n, const Source& source, const Epilogue& epilogue) {
  using acc_t = accumulate_t<tile_t>;
  using V = Vec<acc_t>;
  const int64_t few = left.rows(), depth = left.depth();
  if (few == 0) return;
  std::vector<acc_t> x(few * depth);
  for (int64_t k = 0; k < depth; k += kDepth<tile_t>) {
    for (int64_t r = 0; r < few; ++r) {
      const int64_t ld = left.block_depth(k), count = std::min(ld, depth - k);
      copy_row(x.data() + r * depth + k, left.block(0, k) + r * ld, count, count);
    }
  }
  for_each_item((n + kFewColumns - 1) / kFewColumns, at::get_num_threads(), [&] {
    return [&, wide = std::vector<acc_t>(kTogether * kMostDepth),
            tile = std::vector<acc_t>(kFewRows * kGemmColumns)](int64_t item) mutable {
      const int64_t first = item * kFewColumns, columns = std::min(kFewColumns, n - first);
      if (source.rows_of_panel(first, columns) == 0) return;
      for (int64_t j = 0; j < columns; j += kTogether) {
        const int64_t rows = source.rows_of_panel(first + j, std::min<int64_t>(kTogether, columns - j));
        if (rows == 0) continue;  // nobody looks at these columns
        V totals[kFewRows * kTogether];
        multiply_rows(source, first + j, rows, x, few, depth, wide.data(), totals);
        for (int64_t r = 0; r < few; ++r) {
          for (int64_t i = 0; i < rows; ++i) {
            tile[r * kGemmColumns + j + i] = sum(totals[r * kTogether + i]);
          }
        }
      }
      epilogue(0, few, first, columns, tile.data());
    };
  });
}

}  // namespace flamingo::CPU_CAPABILITY
