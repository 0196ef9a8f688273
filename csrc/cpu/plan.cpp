#include "plan.h"

#include <algorithm>
#include <numeric>

namespace flamingo {
namespace {

// What bringing one block of keys into matmul layout costs, in rows of matmul work on that block.
constexpr double kBlockOverheadRows = 16;

struct Interval {
  int64_t begin, end;
  bool operator==(const Interval& other) const { return begin == other.begin && end == other.end; }
};

Interval interval_at(const int32_t* start, const int32_t* end, int64_t index) {
  return start[index] < end[index] ? Interval{start[index], end[index]} : Interval{0, 0};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Joins `next` to `tile` where that saves work. Their hulls must touch, so that every key of the joint hull is seen.
bool try_join(const Plan& plan, Tile& tile, const Tile& next, int64_t max_queries) {
  if (tile.count + next.count > max_queries) return false;
  if (tile.key_begin == tile.key_end || next.key_begin == next.key_end) return false;
  if (next.key_begin > tile.key_end || tile.key_begin > next.key_end) return false;
  Tile joint = tile;
  joint.count += next.count;
  joint.key_begin = std::min(tile.key_begin, next.key_begin);
  joint.key_end = std::max(tile.key_end, next.key_end);
  joint.uniform = tile.uniform && next.uniform && tile.key_begin == next.key_begin && tile.key_end == next.key_end;
  if (plan.cost(joint) > plan.cost(tile) + plan.cost(next)) return false;
  tile = joint;
  return true;
}

// Queries with one interval in a run become tiles of nearly equal size; short runs are joined.
void tile_row(Plan& plan, const PlanSizes& size, int64_t kv_row, const int32_t* start, const int32_t* end) {
  const int64_t max_queries = std::max<int64_t>(1, kTileRows / size.group);
  const size_t row_begin = plan.tiles.size();
  for (int64_t first = 0; first < size.queries;) {
    const Interval interval = interval_at(start, end, first);
    int64_t last = first + 1;
    while (last < size.queries && interval_at(start, end, last) == interval) ++last;
    const int64_t pieces = ceil_div(last - first, max_queries);
    const int64_t piece = std::min(max_queries, ceil_div(ceil_div(last - first, pieces), 4) * 4);
    for (; first < last; first += piece) {
      const Tile next{kv_row, first, std::min(piece, last - first), interval.begin, interval.end, true};
      if (plan.tiles.size() == row_begin || !try_join(plan, plan.tiles.back(), next, max_queries)) {
        plan.tiles.push_back(next);
      }
    }
    first = last;
  }
}

// Cuts the key axis of a row where no hull crosses, and orders the row's tiles by the piece they lie in.
void split_row(Plan& plan, const PlanSizes& size, int64_t kv_row, size_t row_begin) {
  std::vector<Tile> tiles(plan.tiles.begin() + row_begin, plan.tiles.end());
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.key_begin < b.key_begin; });
  // Tiles that see nothing have the hull [0, 0) and come first among those that begin at 0.
  std::stable_partition(tiles.begin(), tiles.end(), [](const Tile& tile) { return tile.key_begin == tile.key_end; });

  size_t at = 0;
  while (at < tiles.size() && tiles[at].key_begin == tiles[at].key_end) ++at;
  int64_t begin = row_begin;
  if (at > 0) plan.components.push_back({kv_row, 0, 0, begin, begin + static_cast<int64_t>(at)});
  int64_t covered = 0;
  while (at < tiles.size()) {
    Component part{kv_row, tiles[at].key_begin, tiles[at].key_end, begin + static_cast<int64_t>(at), 0};
    if (covered < part.key_begin) plan.components.push_back({kv_row, covered, part.key_begin, 0, 0});
    const size_t part_begin = at;
    for (; at < tiles.size() && tiles[at].key_begin < part.key_end; ++at) {
      part.key_end = std::max(part.key_end, tiles[at].key_end);
    }
    std::sort(tiles.begin() + part_begin, tiles.begin() + at,
              [](const Tile& a, const Tile& b) { return a.first < b.first; });
    part.tile_end = begin + static_cast<int64_t>(at);
    plan.components.push_back(part);
    covered = part.key_end;
  }
  if (covered < size.keys) plan.components.push_back({kv_row, covered, size.keys, 0, 0});
  std::copy(tiles.begin(), tiles.end(), plan.tiles.begin() + row_begin);
}

}  // namespace

int64_t Plan::blocks(int64_t begin, int64_t end) const {
  const int64_t cut = std::clamp(border, begin, end);
  return ceil_div(cut - begin, kBlockKeys) + ceil_div(end - cut, kBlockKeys);
}

double Plan::cost(const Tile& tile) const {
  return blocks(tile.key_begin, tile.key_end) * (kBlockOverheadRows + tile.count * group);
}

double Plan::cost() const {
  double total = 0;
  for (const Tile& tile : tiles) total += cost(tile);
  return total;
}

int64_t first_outside(int64_t count, int64_t keys, const int32_t* start, const int32_t* end) {
  for (int64_t i = 0; i < count; ++i) {
    if (std::min(start[i], end[i]) < 0 || std::max(start[i], end[i]) > keys) return i;
  }
  return -1;
}

Plan make_plan(const PlanSizes& size, const int32_t* start, const int32_t* end) {
  Plan plan;
  plan.group = size.group;
  plan.border = size.border;
  for (int64_t kv_row = 0; kv_row < size.kv_rows; ++kv_row) {
    const size_t row_begin = plan.tiles.size();
    tile_row(plan, size, kv_row, start + kv_row * size.queries, end + kv_row * size.queries);
    split_row(plan, size, kv_row, row_begin);
  }
  return plan;
}

ForwardItems forward_items(const Plan& plan, int64_t kv_heads) {
  constexpr int64_t kManyItems = 64,
                    kPartBlocks = 8;  // so many items are not split; a part has at least so many blocks
  const int64_t most_parts = ceil_div(kManyItems, static_cast<int64_t>(plan.tiles.size()) * kv_heads);
  ForwardItems items{{}, 0};
  items.list.reserve(plan.tiles.size());
  for (size_t i = 0; i < plan.tiles.size(); ++i) {
    const Tile& tile = plan.tiles[i];
    const int64_t tile_index = static_cast<int64_t>(i), blocks = plan.blocks(tile.key_begin, tile.key_end);
    const int64_t wanted = std::clamp<int64_t>(blocks / kPartBlocks, 1, most_parts);
    if (wanted == 1) {
      items.list.push_back({tile_index, tile.key_begin, tile.key_end, 1, 0, 0});
      continue;
    }
    const int64_t step = ceil_div(blocks, wanted) * kBlockKeys;
    const int64_t parts = ceil_div(tile.key_end - tile.key_begin, step);
    const int64_t first = items.partial_rows;
    for (int64_t j = tile.key_begin; j < tile.key_end; j += step) {
      items.list.push_back({tile_index, j, std::min(j + step, tile.key_end), parts, first, items.partial_rows});
      items.partial_rows += ceil_div(tile.count * plan.group, kRowsStep) * kRowsStep;
    }
  }
  return items;
}

BackwardItems backward_items(const Plan& plan, int64_t kv_heads, int64_t threads) {
  constexpr int64_t kMostKeys = 4096, kSplitKeys = 4 * kBlockKeys;
  const double fair_share = plan.cost() * kv_heads / threads;
  BackwardItems items{{}, 0};
  for (const Component& part : plan.components) {
    double cost = 0;
    for (int64_t i = part.tile_begin; i < part.tile_end; ++i) cost += plan.cost(plan.tiles[i]);
    const bool whole = part.key_end - part.key_begin <= kMostKeys && cost <= 1.5 * fair_share;
    const int64_t step = whole ? std::max<int64_t>(part.key_end - part.key_begin, 1) : kSplitKeys;
    for (int64_t g = 0; g < kv_heads; ++g) {
      if (whole) {
        items.list.push_back(
            {part.kv_row, g, part.tile_begin, part.tile_end, part.key_begin, part.key_end, part.key_begin, true, true});
        continue;
      }
      for (int64_t j = part.key_begin, stop; j < part.key_end; j = stop) {
        stop = std::min(j + step, j < plan.border ? std::min(plan.border, part.key_end) : part.key_end);
        items.list.push_back({part.kv_row, g, part.tile_begin, part.tile_end, j, stop, part.key_begin, false, true});
      }
      for (int64_t i = part.tile_begin; i < part.tile_end; ++i) {
        items.list.push_back({part.kv_row, g, i, i + 1, part.key_begin, part.key_end, part.key_begin, true, false});
      }
    }
    items.most_keys = std::max(items.most_keys, std::min(step, part.key_end - part.key_begin));
  }
  return items;
}

}  // namespace flamingo
