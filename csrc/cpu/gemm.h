// A large matmul C = L R in tiles that stay in cache, with work of the caller's before and after it:
//
//   left   [m, k]  is packed once, in blocks of 64 rows, by all threads; the caller's source makes its elements
//                  (normalised, scaled, activated, transposed) while they are in cache.
//   right  [k, n]  is packed by 256 columns, by the thread that takes these as its item.
//   epilogue       gets each finished tile of C, 64 × 256 in fp32, while it is in cache.
//
// In L2 lie a tile of 256 × 256 of C, 2 KiB of depth of its columns of the right, which all its rows meet in turn, and
// two blocks of the left, of which the next is asked for while the other is multiplied.
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

constexpr int64_t kGemmRows = 64, kGemmColumns = 256;  // a tile of C
constexpr int64_t kGroupBlocks = 4;                    // tiles of C, one below the other, that gather together
constexpr int64_t kFewRows = 8, kFewColumns = 64;      // see multiply_few
constexpr int64_t kMostDepth = 1024;                   // see kDepth
constexpr int64_t kLeftBytes = 64 << 20;               // of packed left rows at a time ...
constexpr int64_t kLeastLeftRows = 512;                // ... but so many at least

// Columns of a tile that multiply_by_rows hands to its epilogue.
inline int64_t columns_at_a_time(int64_t rows) { return rows <= kFewRows ? kFewColumns : kGemmColumns; }

// Columns of one call of brgemm: four vectors of accumulators, which it runs fastest. fp64 goes through at::mm, which
// wants few calls.
template <typename tile_t>
constexpr int64_t kPanel = std::is_same_v<tile_t, double> ? kGemmColumns / 2 : 4 * Vec<float>::size();

// Depth that is multiplied at a time: 2 KiB of a row of the left.
template <typename tile_t>
constexpr int64_t kDepth = std::is_same_v<tile_t, double> ? kMostDepth : 2048 / sizeof(tile_t);

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

// Asks for a block of memory bit by bit, between other work.
class Upcoming {
 public:
  Upcoming(const void* data, int64_t bytes, int64_t times)
      : at_(static_cast<const char*>(data)), step_(round_up(bytes / times, 64)) {
    end_ = at_ + bytes;
  }
  void fetch() {
    for (const char* stop = std::min(at_ + step_, end_); at_ < stop; at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_, *end_;
  int64_t step_;
};

// Rows first .. first + rows of a left operand, packed: block (i, k) holds 64 rows × kDepth, contiguous.
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
  int64_t block_depth(int64_t k) const { return std::min(kDepth<tile_t>, padded_ - k); }
  tile_t* block(int64_t i, int64_t k) const { return data_ + i * padded_ + k * block_rows(i); }

  void resize(int64_t rows) { rows_ = rows; }

  // The block that `multiply` takes after (block, k) while it works on the blocks top .. stop of .. end.
  Upcoming upcoming(int64_t block, int64_t k, int64_t top, int64_t stop, int64_t end, int64_t times) const {
    if (++block == stop) {
      block = top;
      k += kDepth<tile_t>;
      if (k >= padded_) {
        block = stop;
        k = 0;
      }
    }
    if (block >= end) return {nullptr, 0, 1};
    const int64_t i = block * kGemmRows;
    return {this->block(i, k), block_rows(i) * block_depth(k) * static_cast<int64_t>(sizeof(tile_t)), times};
  }

  // Element (i, k) is source(first + i, k).
  template <typename Source>
  void fill(const Source& source, int64_t first, int64_t rows) {
    resize(rows);
    for_each_item((rows + kGemmRows - 1) / kGemmRows, at::get_num_threads(), [&] {
      return [&, row = std::vector<acc_t>(kDepth<tile_t>)](int64_t item) mutable {
        const int64_t i = item * kGemmRows;
        for (int64_t k = 0; k < padded_; k += kDepth<tile_t>) {
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
          const int64_t count = std::min(kGemmRows, depth_ - k), outer = k / kDepth<tile_t> * kDepth<tile_t>;
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

// 256 columns of a right operand [depth, n], packed: for each kDepth, panels of kPanel columns, contiguous. Holds
// the whole depth, or where `whole` is false the kDepth that was filled last.
template <typename tile_t>
class Right {
  using acc_t = accumulate_t<tile_t>;
  static constexpr int64_t kStageLd = kDepth<tile_t> + 16;  // not a power of two, which L1 takes badly

 public:
  Right(int64_t depth, bool whole) : depth_(depth), padded_(round_up(depth, is_vnni<tile_t> ? 2 : 1)), whole_(whole) {
    for (int turn = 0; turn < 2; ++turn) {
      data_ = arena_.take<tile_t>((whole ? padded_ : std::min(padded_, kDepth<tile_t>)) * kGemmColumns);
      wide_ = arena_.take<acc_t>(kDepth<tile_t>);
      narrow_ = arena_.take<tile_t>(kPanel<tile_t> * kStageLd);
      if (turn == 0) arena_.allocate();
    }
  }

  const tile_t* panel(int64_t k, int64_t column) const { return block(k) + column * block_depth(k); }

  // Element (k + i, j) is source(k + i, first + j) for kDepth i; columns past `columns` are 0.
  template <typename Source>
  void fill(const Source& source, int64_t k, int64_t first, int64_t columns) {
    constexpr int64_t kStep = is_vnni<tile_t> ? 2 : 1, kAhead = 8;
    const int64_t rows = std::min(kDepth<tile_t>, depth_ - k), padded = block_depth(k);
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

  // Element (k + i, j) is source(first + j, k + i) for kDepth i; columns past `columns` are 0. A panel's rows of the
  // source must lie together.
  template <typename Source>
  void fill_transposed(const Source& source, int64_t k, int64_t first, int64_t columns) {
    const int64_t count = std::min(kDepth<tile_t>, depth_ - k), padded = block_depth(k);
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
  int64_t block_depth(int64_t k) const { return std::min(kDepth<tile_t>, padded_ - k); }
  tile_t* block(int64_t k) const { return data_ + (whole_ ? k * kGemmColumns : 0); }

  const int64_t depth_, padded_;
  const bool whole_;
  Arena arena_;
  tile_t* data_;
  acc_t* wide_;
  tile_t* narrow_;
};

// Packs a right operand whose columns are rows of a weight.
template <typename Source>
auto columns_from_rows(const Source& source) {
  return [&source](auto& right, int64_t k, int64_t first, int64_t columns) {
    right.fill_transposed(source, k, first, columns);
  };
}

template <typename Source>
auto columns_from_columns(const Source& source) {
  return [&source](auto& right, int64_t k, int64_t first, int64_t columns) { right.fill(source, k, first, columns); };
}

// ---- the matmul -----------------------------------------------------------------------------------------------------

// C = left · R for the rows packed in `left`. fill(right, k, first, columns) packs kDepth of columns of R;
// epilogue(i, rows, j, columns, tile) gets C[i .. i + rows, j .. j + columns] as a tile of leading dimension
// kGemmColumns, which it may overwrite. It runs in parallel, once per tile. ask(i, rows, j, columns) comes some time
// before it and may ask for the memory that it touches.
template <typename tile_t, typename Fill, typename Epilogue, typename Ask>
void multiply(const Left<tile_t>& left, int64_t n, const Fill& fill, const Epilogue& epilogue, const Ask& ask) {
  using acc_t = accumulate_t<tile_t>;
  const int64_t groups = (n + kGemmColumns - 1) / kGemmColumns, blocks = (left.rows() + kGemmRows - 1) / kGemmRows;
  if (groups == 0 || blocks == 0) return;
  // Where columns alone leave threads without work, rows are shared out too, and the right is packed more than once.
  const int64_t threads = at::get_num_threads();
  const int64_t parts = std::clamp<int64_t>((2 * threads + groups - 1) / groups, 1, (blocks + 3) / 4);
  struct Worker {
    Worker(int64_t depth, bool whole) : right(depth, whole), tiles(kGroupBlocks * kGemmRows * kGemmColumns) {}
    ~Worker() { release_matmul<tile_t>(); }
    Right<tile_t> right;
    std::vector<acc_t> tiles;
  };
  for_each_item(groups * parts, threads, [&] {
    return [&, worker = std::make_unique<Worker>(left.depth(), blocks > kGroupBlocks)](int64_t item) {
      const int64_t part = item % parts, first_block = blocks * part / parts, end_block = blocks * (part + 1) / parts;
      const int64_t first = item / parts * kGemmColumns, columns = std::min(kGemmColumns, n - first);
      const int64_t panels = (columns + kPanel<tile_t> - 1) / kPanel<tile_t>;
      for (int64_t top = first_block; top < end_block; top += kGroupBlocks) {
        const int64_t stop = std::min(top + kGroupBlocks, end_block);
        const auto tile_of = [&](int64_t block) {
          return worker->tiles.data() + (block - top) * kGemmRows * kGemmColumns;
        };
        if (left.depth() == 0) std::fill(worker->tiles.begin(), worker->tiles.end(), acc_t(0));
        for (int64_t k = 0; k < left.padded_depth(); k += kDepth<tile_t>) {
          if (top == first_block) fill(worker->right, k, first, columns);
          const int64_t depth = left.block_depth(k);
          for (int64_t block = top; block < stop; ++block) {
            const int64_t i = block * kGemmRows, rows = left.block_rows(i);
            if (k + kDepth<tile_t> >= left.padded_depth()) ask(i, rows, first, columns);
            Upcoming next = left.upcoming(block, k, top, stop, end_block, panels);
            for (int64_t j = 0; j < columns; j += kPanel<tile_t>) {
              next.fetch();
              matmul(rows, kPanel<tile_t>, depth, left.block(i, k), depth, worker->right.panel(k, j), kPanel<tile_t>,
                     tile_of(block) + j, kGemmColumns, k > 0);
            }
          }
        }
        for (int64_t block = top; block < stop; ++block) {
          epilogue(block * kGemmRows, left.block_rows(block * kGemmRows), first, columns, tile_of(block));
        }
      }
    };
  });
}

// ---- few rows -------------------------------------------------------------------------------------------------------
//
// With a few rows on the left, as in decoding, packing a weight would cost more than all the rest. So each of its rows
// is read once, as it lies, for dot products with all rows of the left; what that costs is the weight's way from
// memory.

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

// C = left · R where column j of R is row j of `source`.
template <typename tile_t, typename Source, typename Epilogue, typename Ask>
void multiply_by_rows(const Left<tile_t>& left, int64_t n, const Source& source, const Epilogue& epilogue,
                      const Ask& ask) {
  if (left.rows() <= kFewRows) return multiply_few(left, n, source, epilogue);
  multiply(left, n, columns_from_rows(source), epilogue, ask);
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
