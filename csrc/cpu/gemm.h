// A large matmul C = L R in tiles that stay in cache, with work of the caller's before and after it:
//
//   left   [m, k]  is packed once, in blocks of 64 rows, by all threads; the caller's source makes its elements
//                  (normalised, scaled, activated, transposed) while they are in cache.
//   right  [k, n]  is packed by 128 columns, by the thread that takes these as its item.
//   epilogue       gets each finished tile of C, 64 × 128 in fp32, while it is in cache.
//
// brgemm does the multiplication. It is used for every shape and dtype: on the machines measured (Zen 3 and Zen 4) it
// reaches at least the speed of at::mm, which would see neither source nor epilogue. Threads share out the columns, so
// each weight is packed once per chunk of rows. The order of every sum is fixed by the shapes alone.
#pragma once

#include <memory>
#include <vector>

#include "matrix.h"
#include "parallel.h"
#include "tiles.h"

namespace flamingo::CPU_CAPABILITY {

constexpr int64_t kGemmRows = 64, kGemmColumns = 128;  // a tile of C
constexpr int64_t kGemmDepth = 512;                    // taken at a time, so that a block of the left stays in L2
constexpr int64_t kLeftBytes = 32 << 20;               // of packed left rows at a time ...
constexpr int64_t kLeastLeftRows = 512;                // ... but so many at least

// Columns of one call of brgemm: four vectors of accumulators, which it runs fastest. fp64 goes through at::mm, which
// wants few calls.
template <typename tile_t>
constexpr int64_t kPanel = std::is_same_v<tile_t, double> ? kGemmColumns / 2 : 4 * Vec<float>::size();

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
// load(row, column, count, out) writes count <= kGemmDepth elements of a row. memory<T>(row, column) is where they lie
// in memory as they are, or null. rows_of_panel(row, count): how many of the rows from `row` on are there.

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
  int64_t ld() const { return x.ld; }
  int64_t rows_of_panel(int64_t, int64_t count) const { return count; }
};

// Base of the sources that compute.
struct Computed {
  template <typename T>
  const T* memory(int64_t, int64_t) const {
    return nullptr;
  }
  int64_t ld() const { return 0; }
  int64_t rows_of_panel(int64_t, int64_t count) const { return count; }
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

// ---- operands -------------------------------------------------------------------------------------------------------

// out = `count` elements of a row of the source as matmul operands, 0 up to `padded`; `wide` is scratch.
template <typename tile_t, typename acc_t, typename Source>
void load_narrow(const Source& source, int64_t row, int64_t column, int64_t count, int64_t padded, tile_t* out,
                 acc_t* wide) {
  if constexpr (std::is_same_v<tile_t, acc_t>) {
    source.load(row, column, count, out);
    std::fill(out + count, out + padded, tile_t(0));
  } else {
    source.load(row, column, count, wide);
    copy_row(out, wide, count, padded);
  }
}

// Narrows a tile of `rows` × `columns` to matmul operands and pads each row with a zero to even length for VNNI.
template <typename tile_t, typename acc_t>
void store_left(tile_t* out, int64_t ld_out, const acc_t* in, int64_t ld_in, int64_t rows, int64_t columns,
                int64_t padded) {
  for (int64_t r = 0; r < rows; ++r) copy_row(out + r * ld_out, in + r * ld_in, columns, padded);
}

// Rows first .. first + rows of a left operand, packed: block (i, k) holds 64 rows × 512 of depth, contiguous.
template <typename tile_t>
class Left {
  using acc_t = accumulate_t<tile_t>;

 public:
  Left(int64_t most_rows, int64_t depth)
      : depth_(depth), padded_(round_up(depth, is_vnni<tile_t> ? 2 : 1)), most_rows_(most_rows) {
    data_ = static_cast<tile_t*>(c10::alloc_cpu(std::max<int64_t>(most_rows * padded_ * sizeof(tile_t), 1)));
  }
  Left(const Left&) = delete;
  Left& operator=(const Left&) = delete;
  ~Left() { c10::free_cpu(data_); }

  int64_t rows() const { return rows_; }
  int64_t depth() const { return depth_; }
  int64_t padded_depth() const { return padded_; }
  int64_t block_rows(int64_t i) const { return std::min(kGemmRows, rows_ - i); }
  int64_t block_depth(int64_t k) const { return std::min(kGemmDepth, padded_ - k); }
  tile_t* block(int64_t i, int64_t k) const { return data_ + i * padded_ + k * block_rows(i); }

  void resize(int64_t rows) { rows_ = rows; }

  // Element (i, k) is source(first + i, k).
  template <typename Source>
  void fill(const Source& source, int64_t first, int64_t rows) {
    resize(rows);
    for_each_item((rows + kGemmRows - 1) / kGemmRows, at::get_num_threads(), [&] {
      return [&, row = std::vector<acc_t>(kGemmDepth)](int64_t item) mutable {
        const int64_t i = item * kGemmRows;
        for (int64_t k = 0; k < padded_; k += kGemmDepth) {
          const int64_t ld = block_depth(k), count = std::min(ld, depth_ - k);
          for (int64_t r = 0; r < block_rows(i); ++r) {
            load_narrow(source, first + i + r, k, count, ld, block(i, k) + r * ld, row.data());
          }
        }
      };
    });
  }

  // Element (i, k) is source(k, first + i).
  template <typename Source>
  void fill_transposed(const Source& source, int64_t first, int64_t rows) {
    resize(rows);
    for_each_item((rows + kGemmRows - 1) / kGemmRows, at::get_num_threads(), [&] {
      return [&, straight = std::vector<acc_t>(kGemmRows * kGemmRows),
              turned = std::vector<acc_t>(kGemmRows * kGemmRows)](int64_t item) mutable {
        const int64_t i = item * kGemmRows, columns = block_rows(i);
        for (int64_t k = 0; k < depth_; k += kGemmRows) {
          const int64_t count = std::min(kGemmRows, depth_ - k), outer = k / kGemmDepth * kGemmDepth;
          for (int64_t r = 0; r < count; ++r) {
            source.load(k + r, first + i, columns, straight.data() + r * kGemmRows);
          }
          transpose_blocks<16>(turned.data(), kGemmRows, straight.data(), kGemmRows, count, columns, count);
          const int64_t ld = block_depth(outer), padded = k + count == depth_ ? padded_ - k : count;
          store_left(block(i, outer) + k - outer, ld, turned.data(), kGemmRows, columns, count, padded);
        }
      };
    });
  }

 private:
  const int64_t depth_, padded_, most_rows_;
  int64_t rows_ = 0;
  tile_t* data_;
};

// How many of `rows` of a left operand are packed at a time; the pieces are about equal.
template <typename tile_t>
int64_t chunk_of_rows(int64_t rows, int64_t depth) {
  const int64_t fit = kLeftBytes / (std::max<int64_t>(depth, 1) * static_cast<int64_t>(sizeof(tile_t)));
  const int64_t chunks = (rows + std::max(fit, kLeastLeftRows) - 1) / std::max(fit, kLeastLeftRows);
  return chunks ? round_up((rows + chunks - 1) / chunks, kGemmRows) : 0;
}

// 128 columns of a right operand [depth, n], packed: for each 512 of depth, panels of kPanel columns, contiguous. Holds
// the whole depth, or where `whole` is false the 512 that were filled last.
template <typename tile_t>
class Right {
  using acc_t = accumulate_t<tile_t>;
  static constexpr int64_t kStageLd = kGemmDepth + 16;  // not a power of two, which L1 takes badly

 public:
  Right(int64_t depth, bool whole) : depth_(depth), padded_(round_up(depth, is_vnni<tile_t> ? 2 : 1)), whole_(whole) {
    for (int turn = 0; turn < 2; ++turn) {
      data_ = arena_.take<tile_t>((whole ? padded_ : std::min(padded_, kGemmDepth)) * kGemmColumns);
      wide_ = arena_.take<acc_t>(kGemmDepth);
      narrow_ = arena_.take<tile_t>(kPanel<tile_t> * kStageLd);
      if (turn == 0) arena_.allocate();
    }
  }

  const tile_t* panel(int64_t k, int64_t column) const { return block(k) + column * block_depth(k); }

  // Element (k + i, j) is source(k + i, first + j) for 512 i; columns past `columns` are 0.
  template <typename Source>
  void fill(const Source& source, int64_t k, int64_t first, int64_t columns) {
    constexpr int64_t kStep = is_vnni<tile_t> ? 2 : 1, kAhead = 8;
    const int64_t rows = std::min(kGemmDepth, depth_ - k), padded = block_depth(k);
    const int64_t panels = round_up(columns, kPanel<tile_t>);
    for (int64_t r = 0; r < rows; r += kStep) {
      const int64_t count = std::min(kStep, rows - r);
      const tile_t* memory = source.template memory<tile_t>(k + r, first);
      int64_t ld = source.ld();
      if (memory && r + kAhead < rows) {  // rows lie far apart
        const auto* ahead = reinterpret_cast<const char*>(memory + kAhead * ld);
        for (int64_t i = 0; i < columns * static_cast<int64_t>(sizeof(tile_t)); i += 64) __builtin_prefetch(ahead + i);
      }
      if (!memory || columns < panels) {
        ld = kGemmColumns;
        for (int64_t i = 0; i < count; ++i) {
          load_narrow(source, k + r + i, first, columns, panels, narrow_ + i * ld, wide_);
        }
        memory = narrow_;
      }
      for (int64_t j = 0; j < panels; j += kPanel<tile_t>) {
        tile_t* out = block(k) + j * padded + r * kPanel<tile_t>;
        if constexpr (is_vnni<tile_t>) {
          rows_right(out, memory + j, ld, count, kPanel<tile_t>, kStep);
        } else {
          copy_row(out, memory + j, kPanel<tile_t>, kPanel<tile_t>);
        }
      }
    }
  }

  // Element (k + i, j) is source(first + j, k + i) for 512 i; columns past `columns` are 0. A panel's rows of the
  // source must lie together.
  template <typename Source>
  void fill_transposed(const Source& source, int64_t k, int64_t first, int64_t columns) {
    const int64_t count = std::min(kGemmDepth, depth_ - k), padded = block_depth(k);
    for (int64_t j = 0; j < columns; j += kPanel<tile_t>) {
      const int64_t rows = source.rows_of_panel(first + j, std::min(kPanel<tile_t>, columns - j));
      tile_t* out = block(k) + j * padded;
      const tile_t* memory = source.template memory<tile_t>(first + j, k);
      const int64_t ld = source.ld();
      if (memory && !(is_vnni<tile_t> && (count % 2 || ld % 2 || reinterpret_cast<uintptr_t>(memory) % 4))) {
        transpose_right(out, kPanel<tile_t>, memory, ld, rows, padded, kPanel<tile_t>);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        load_narrow(source, first + j + r, k, count, padded, narrow_ + r * kStageLd, wide_);
      }
      transpose_right(out, kPanel<tile_t>, narrow_, kStageLd, rows, padded, kPanel<tile_t>);
    }
  }

 private:
  int64_t block_depth(int64_t k) const { return std::min(kGemmDepth, padded_ - k); }
  tile_t* block(int64_t k) const { return data_ + (whole_ ? k * kGemmColumns : 0); }

  const int64_t depth_, padded_;
  const bool whole_;
  Arena arena_;
  tile_t* data_;
  acc_t* wide_;
  tile_t* narrow_;
};

// ---- the matmul -----------------------------------------------------------------------------------------------------

// C = left · R for the rows packed in `left`. fill(right, k, first, columns) packs 512 of depth of columns of R;
// epilogue(i, rows, j, columns, tile) gets C[i .. i + rows, j .. j + columns] as a tile of leading dimension
// kGemmColumns, which it may overwrite. It runs in parallel, once per tile.
template <typename tile_t, typename Fill, typename Epilogue>
void multiply(const Left<tile_t>& left, int64_t n, const Fill& fill, const Epilogue& epilogue) {
  using acc_t = accumulate_t<tile_t>;
  const int64_t groups = (n + kGemmColumns - 1) / kGemmColumns, blocks = (left.rows() + kGemmRows - 1) / kGemmRows;
  if (groups == 0 || blocks == 0) return;
  // Where columns alone leave threads without work, rows are shared out too, and the right is packed more than once.
  const int64_t threads = at::get_num_threads();
  const int64_t parts = std::clamp<int64_t>((4 * threads + groups - 1) / groups, 1, (blocks + 3) / 4);
  struct Worker {
    Worker(int64_t depth, bool whole) : right(depth, whole), tile(kGemmRows * kGemmColumns) {}
    ~Worker() { release_matmul<tile_t>(); }
    Right<tile_t> right;
    std::vector<acc_t> tile;
  };
  for_each_item(groups * parts, threads, [&] {
    return [&, worker = std::make_unique<Worker>(left.depth(), blocks > 1)](int64_t item) {
      const int64_t part = item % parts, first_block = blocks * part / parts;
      const int64_t first = item / parts * kGemmColumns, columns = std::min(kGemmColumns, n - first);
      acc_t* tile = worker->tile.data();
      for (int64_t block = first_block; block < blocks * (part + 1) / parts; ++block) {
        const int64_t i = block * kGemmRows, rows = left.block_rows(i);
        if (left.depth() == 0) std::fill_n(tile, kGemmRows * kGemmColumns, acc_t(0));
        for (int64_t k = 0; k < left.padded_depth(); k += kGemmDepth) {
          if (block == first_block) fill(worker->right, k, first, columns);
          const int64_t depth = left.block_depth(k);
          for (int64_t j = 0; j < columns; j += kPanel<tile_t>) {
            matmul(rows, kPanel<tile_t>, depth, left.block(i, k), depth, worker->right.panel(k, j), kPanel<tile_t>,
                   tile + j, kGemmColumns, k > 0);
          }
        }
        epilogue(i, rows, first, columns, tile);
      }
    };
  });
}

// Types of a call: `tile_t` for its matmuls.
template <typename Run>
void for_tile(c10::ScalarType compute, bool narrow_tiles, const Run& run) {
  if (compute == at::kDouble) return run.template operator()<double>();
#if defined(CPU_CAPABILITY_AVX512)
  if (compute == at::kBFloat16 && narrow_tiles) return run.template operator()<at::BFloat16>();
#endif
  run.template operator()<float>();
}

}  // namespace flamingo::CPU_CAPABILITY
