// Rows of matrices in memory, and the sources that operands of a matmul are packed from (operands.h).
#pragma once

#include <vector>

#include "matrix.h"
#include "tiles.h"

namespace flamingo::CPU_CAPABILITY {

constexpr int64_t kMostDepth = 1024;  // elements of a row that a source makes at a time, at most

// ---- memory ---------------------------------------------------------------------------------------------------------

template <typename Run>
void for_type(c10::ScalarType type, const Run& run) {
  switch (type) {
    case at::kFloat:
      return run(float());
    case at::kDouble:
      return run(double());
    case at::kHalf:
      return run(at::Half());
    default:
      return run(at::BFloat16());
  }
}

template <typename T>
T* element(const Matrix& x, int64_t row, int64_t column) {
  return static_cast<T*>(x.data) + row * x.ld + column;
}

// out[i] = x[row, column + i], widened.
template <typename acc_t>
void load_row(const Matrix& x, int64_t row, int64_t column, int64_t count, acc_t* out) {
  for_type(x.type, [&](auto example) {
    using in_t = decltype(example);
    if constexpr (std::is_same_v<in_t, acc_t> || (std::is_same_v<acc_t, float> && !std::is_same_v<in_t, double>)) {
      copy_row(out, element<in_t>(x, row, column), count, count);
    }
  });
}

// x[row, column + i] = in[i], narrowed.
template <typename acc_t>
void store_row(const Matrix& x, int64_t row, int64_t column, int64_t count, const acc_t* in) {
  for_type(x.type, [&](auto example) {
    using out_t = decltype(example);
    if constexpr (std::is_same_v<out_t, acc_t> || (std::is_same_v<acc_t, float> && !std::is_same_v<out_t, double>)) {
      copy_row(element<out_t>(x, row, column), in, count, count);
    }
  });
}

// Asks for a piece of x, to be read or written; for nothing where there is no x.
template <bool kWrite>
void ask_for(const Matrix& x, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const int64_t size = c10::elementSize(x.type);
  for (int64_t r = row; x && r < row + rows; ++r) {
    const char* at = static_cast<const char*>(x.data) + (r * x.ld + column) * size;
    for (int64_t i = 0; i < columns * size; i += 64) __builtin_prefetch(at + i, kWrite, /*locality=*/2);
  }
}

// out[i] = f(out[i], a vector of each of `more`), elementwise.
template <typename acc_t, typename F, typename... More>
void map_row(acc_t* out, int64_t count, const F& f, const More*... more) {
  using V = Vec<acc_t>;
  int64_t i = 0;
  for (; i + V::size() <= count; i += V::size()) f(V::loadu(out + i), V::loadu(more + i)...).store(out + i);
  if (i < count) f(V::loadu(out + i, count - i), V::loadu(more + i, count - i)...).store(out + i, count - i);
}

// ---- sources: what the elements of an operand are -------------------------------------------------------------------
//
// load(row, column, count, out) writes count <= kMostDepth elements of a row. memory<T>(row, column) is where they lie
// in memory as they are, or null; type() is the type they may lie there in. rows_of_panel(row, count): how many of the
// rows from `row` on are there.

struct Plain {
  Matrix x;

  template <typename acc_t>
  void load(int64_t row, int64_t column, int64_t count, acc_t* out) const {
    load_row(x, row, column, count, out);
  }
  template <typename T>
  const T* memory(int64_t row, int64_t column) const {
    return x.type == c10::CppTypeToScalarType<T>::value ? element<T>(x, row, column) : nullptr;
  }
  c10::ScalarType type() const { return x.type; }
  int64_t ld() const { return x.ld; }
  int64_t rows_of_panel(int64_t, int64_t count) const { return count; }
};

// Base of the sources that compute.
struct Computed {
  template <typename T>
  const T* memory(int64_t, int64_t) const {
    return nullptr;
  }
  c10::ScalarType type() const { return c10::ScalarType::Float; }  // of memory there is none
  int64_t ld() const { return 0; }
  int64_t rows_of_panel(int64_t, int64_t count) const { return count; }
};

// Matrices of as many rows beside one another.
template <typename acc_t>
class Beside : public Computed {
 public:
  // scale, one element per column, may be null.
  explicit Beside(const std::vector<Matrix>& parts, const acc_t* scale = nullptr) : parts_(parts), scale_(scale) {
    for (const Matrix& x : parts) columns_ += x.columns;
  }

  int64_t rows() const { return parts_[0].rows; }
  int64_t columns() const { return columns_; }
  void load(int64_t row, int64_t column, int64_t count, acc_t* out) const {
    int64_t begin = 0;  // of a part
    for (const Matrix& x : parts_) {
      const int64_t first = std::max(column, begin), end = std::min(column + count, begin + x.columns);
      if (first < end) load_row(x, row, first - begin, end - first, out + first - column);
      begin += x.columns;
    }
    if (scale_) map_row(out, count, [](auto a, auto s) { return a * s; }, scale_ + column);
  }

 private:
  const std::vector<Matrix>& parts_;
  const acc_t* scale_;
  int64_t columns_ = 0;
};

// x[r, c] · scale[c]; scale may be null.
template <typename acc_t>
struct Scaled : Computed {
  Matrix x;
  const acc_t* scale;
  Scaled(const Matrix& x, const acc_t* scale) : x(x), scale(scale) {}

  void load(int64_t row, int64_t column, int64_t count, acc_t* out) const {
    load_row(x, row, column, count, out);
    if (scale) map_row(out, count, [](auto a, auto s) { return a * s; }, scale + column);
  }
};

// The rows of x after their norm.
template <typename acc_t>
struct Normalised : Computed {
  Matrix x;
  Norm norm;
  Normalised(const Matrix& x, const Norm& norm) : x(x), norm(norm) {}

  void load(int64_t row, int64_t column, int64_t count, acc_t* out) const {
    using V = Vec<acc_t>;
    load_row(x, row, column, count, out);
    if (norm.kind == NormKind::kNone) return;
    const V mean(static_cast<const acc_t*>(norm.mean)[row]), rstd(static_cast<const acc_t*>(norm.rstd)[row]);
    const auto *weight = static_cast<const acc_t*>(norm.weight), *bias = static_cast<const acc_t*>(norm.bias);
    if (weight && bias) {
      const auto affine = [&](V a, V w, V b) { return at::vec::fmadd((a - mean) * rstd, w, b); };
      map_row(out, count, affine, weight + column, bias + column);
    } else if (weight) {
      map_row(out, count, [&](V a, V w) { return (a - mean) * rstd * w; }, weight + column);
    } else {
      map_row(out, count, [&](V a) { return (a - mean) * rstd; });
    }
  }
};

}  // namespace flamingo::CPU_CAPABILITY
