// Turns the intervals of a call into work: tiles of queries, and components of the key axis.
//
// A tile is a run of queries that is attended as one block of matmuls over the hull of their intervals. A component is
// a stretch of the key axis that no tile's hull crosses the ends of: all that backward does for its keys and for the
// queries of its tiles happens inside it, which is why dK and dV need no atomics. In the "latest" mode every media is a
// component; in "all" the whole row is one.
//
// Keys are taken in blocks of 64. The key axis may be made of two tensors; where the second begins is the border, and
// no block crosses it.
//
// The queries of a key row are those of all rows that share it (beams), numbered 0 .. (B / B')·T in memory order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace flamingo {

constexpr int64_t kBlockKeys = 64;  // keys taken at a time: one media of 64 latents
constexpr int64_t kTileRows = 128;  // rows (queries × query heads of a key head) of a tile, at most
constexpr int64_t kRowsStep = 16;   // rows of scratch are rounded up to this, the side of a transposed block

struct Tile {
  int64_t kv_row;
  int64_t first, count;        // queries of the key row
  int64_t key_begin, key_end;  // hull of their intervals; equal where they see nothing
  bool uniform;                // every query sees the whole hull
};

struct Component {
  int64_t kv_row;
  int64_t key_begin, key_end;
  int64_t tile_begin, tile_end;  // in Plan::tiles; none for keys that nobody sees
};

struct Plan {
  std::vector<Tile> tiles;            // by component, in the order of their queries
  std::vector<Component> components;  // cover the key axis of every row; one more per row for tiles that see nothing
  int64_t group;                      // query heads per key head: rows per query of a tile
  int64_t border;                     // where the second source of keys begins

  // Where the block ends that holds key j of a run of keys first .. end. Blocks are counted from its first key, and
  // anew from the border.
  int64_t block_end(int64_t first, int64_t j, int64_t end) const {
    if (j < border) {
      end = std::min(end, border);
    } else {
      first = std::max(first, border);
    }
    return std::min(end, first + ((j - first) / kBlockKeys + 1) * kBlockKeys);
  }

  // Blocks of a run of keys.
  int64_t blocks(int64_t begin, int64_t end) const;

  // Of one key head, in rows of matmul work on a block of keys.
  double cost(const Tile& tile) const;
  double cost() const;
};

struct PlanSizes {
  int64_t kv_rows, queries, keys, border, group;  // queries: per key row
};

// Index of the first of `count` intervals that lies outside 0..keys, or -1.
int64_t first_outside(int64_t count, int64_t keys, const int32_t* start, const int32_t* end);

// start, end: [kv_rows, queries], contiguous, within 0..keys; no size is 0.
Plan make_plan(const PlanSizes& size, const int32_t* start, const int32_t* end);

// What one item of forward does: a tile on all of its keys, or on one part of them.
struct ForwardItem {
  int64_t tile;                            // in Plan::tiles
  int64_t key_begin, key_end;              // of the tile's hull
  int64_t parts;                           // of the tile; 1: the item finishes it
  int64_t first_partial_row, partial_row;  // of the results of the first part and of this one, in scratch
};

struct ForwardItems {
  std::vector<ForwardItem> list;  // the parts of a tile in their order
  int64_t partial_rows;           // per key head
};

// Where tiles are few and see many keys, as in decoding, their keys are split up. This depends on the plan alone, and
// so do the results.
ForwardItems forward_items(const Plan& plan, int64_t kv_heads);

// What one item of backward does: some tiles of a component, on some of its keys, for one key head.
struct BackwardItem {
  int64_t kv_row, kv_head;
  int64_t tile_begin, tile_end;
  int64_t key_begin, key_end;
  int64_t first_key;  // of the component: its blocks of keys are counted from here; no split cuts one
  bool want_dq, want_dkv;
};

struct BackwardItems {
  std::vector<BackwardItem> list;
  int64_t most_keys;  // of an item that wants dK and dV
};

// A component is one item, which does dQ, dK and dV in one pass; but where that would leave threads without work, or
// need too much scratch, it is split: dQ by tile, dK and dV by keys. The results are the same to the bit.
BackwardItems backward_items(const Plan& plan, int64_t kv_heads, int64_t threads);

}  // namespace flamingo
