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
// brgemm does the multiplication, for every shape and dtype: on the machines measured (Zen 3, 4 and 5) it reaches at
// least the speed of at::mm, which would see neither source nor epilogue; on Zen 5 530 GFLOP/s in fp32 on two cores,
// where at::mm has 210, and 1060 in bf16, where it has 950. Only a few rows go another way (few_rows.h). Threads share
// out the columns, so each weight is packed once per chunk of rows. The order of every sum is fixed by the shapes
// alone.
#pragma once

#include <memory>
#include <vector>

#include "few_rows.h"
#include "operands.h"
#include "parallel.h"

namespace flamingo::CPU_CAPABILITY {

// C = left · R for the rows packed in `left`. fill(right, k, first, columns) packs kDepth of columns of R;
// epilogue(i, rows, j, columns, tile) gets C[i .. i + rows, j .. j + columns] as a tile of leading dimension
// kGemmColumns, which it may overwrite. It runs in parallel, once per tile. ask(i, rows, j, columns) comes some time
// before it and may ask for the memory that it touches.
template <typename tile_t, typename Fill, typename Epilogue, typename Ask>
void multiply(const Left<tile_t>& left, int64_t n, const Fill& fill, const Epilogue& epilogue, const Ask& ask) {
  using acc_t = accumulate_t<tile_t>;
  const int64_t groups = (n + kGemmColumns - 1) / kGemmColumns, blocks = (left.rows() + kGemmRows - 1) / kGemmRows;
  if (groups == 0 || blocks == 0) return;
  // Of the groups of columns that do not come out even among the threads, rows are shared out too. Each part packs the
  // right anew, so it gets four blocks of rows at least.
  const int64_t threads = at::get_num_threads(), shared = groups % threads, whole = groups - shared;
  const int64_t parts = shared ? std::clamp<int64_t>((2 * threads + shared - 1) / shared, 1, (blocks + 3) / 4) : 1;
  constexpr int64_t kTiles = kGroupBlocks * kGemmRows * kGemmColumns;
  struct Worker {
    Worker(int64_t depth, bool whole) : right(depth, whole) {
      for (int turn = 0; turn < 2; ++turn) {
        tiles = arena.take<acc_t>(kTiles);
        if (turn == 0) arena.allocate();
      }
    }
    ~Worker() { release_matmul<tile_t>(); }
    Right<tile_t> right;
    Arena arena;
    acc_t* tiles;
  };
  for_each_item(whole + shared * parts, threads, [&] {
    return [&, worker = std::make_unique<Worker>(left.depth(), blocks > kGroupBlocks)](int64_t item) {
      const int64_t part = std::max<int64_t>(item - whole, 0) % parts, of = item < whole ? 1 : parts;
      const int64_t first_block = blocks * part / of, end_block = blocks * (part + 1) / of;
      const int64_t group = item < whole ? item : whole + (item - whole) / parts;
      const int64_t first = group * kGemmColumns, columns = std::min(kGemmColumns, n - first);
      const int64_t panels = (columns + kPanel<tile_t> - 1) / kPanel<tile_t>;
      for (int64_t top = first_block; top < end_block; top += kGroupBlocks) {
        const int64_t stop = std::min(top + kGroupBlocks, end_block);
        const auto tile_of = [&](int64_t block) { return worker->tiles + (block - top) * kGemmRows * kGemmColumns; };
        if (left.depth() == 0) std::fill_n(worker->tiles, kTiles, acc_t(0));
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

// Columns of a tile that multiply_by_rows hands to its epilogue.
inline int64_t columns_at_a_time(int64_t rows) { return rows <= kFewRows ? kFewColumns : kGemmColumns; }

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
