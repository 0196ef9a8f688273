// The packed operands of the tiled matmul (gemm.h), and how it is tiled.
#pragma once

#include <vector>

#include "parallel.h"
#include "scratch.h"
#include "sources.h"

namespace flamingo::CPU_CAPABILITY {

constexpr int64_t kGemmRows = 64, kGemmColumns = 256;  // a tile of C
constexpr int64_t kGroupBlocks = 4;                    // tiles of C, one below the other, that gather together
constexpr int64_t kLeftBytes = 64 << 20;               // of packed left rows at a time ...
constexpr int64_t kLeastLeftRows = 512;                // ... but so many at least

// Columns of one call of brgemm: four vectors of accumulators, which it runs fastest. fp64 goes through at::mm, which
// wants few calls.
template <typename tile_t>
constexpr int64_t kPanel = std::is_same_v<tile_t, double> ? kGemmColumns / 2 : 4 * Vec<float>::size();

// Depth that is multiplied at a time: 2 KiB of a row of the left.
template <typename tile_t>
constexpr int64_t kDepth = std::is_same_v<tile_t, double> ? kMostDepth : 2048 / sizeof(tile_t);

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
  Left(int64_t most_rows, int64_t depth) : depth_(depth), padded_(round_up(depth, is_vnni<tile_t> ? 2 : 1)) {
    data_ = static_cast<tile_t*>(take_scratch(std::max<int64_t>(most_rows * padded_ * sizeof(tile_t), 1)));
  }
  Left(const Left&) = delete;
  Left& operator=(const Left&) = delete;
  ~Left() { give_scratch(data_); }

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
  const int64_t depth_, padded_;
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
          using V = Vec<tile_t>;  // memcpy is a call, too dear for so little
          for (int64_t i = 0; i < kPanel<tile_t>; i += V::size()) V::loadu(memory + j + i).store(out + i);
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

}  // namespace flamingo::CPU_CAPABILITY
