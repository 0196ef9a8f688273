// The intervals of a tile's query rows: which keys a row sees, which a tile has to read, and which of those nobody
// sees.
//
// A query row is a pair of a token and one of the R query heads that share a key head: row = token · R + r.
#pragma once

#include <climits>

#include "cuda/numbers.cuh"

namespace flamingo {

constexpr unsigned kWarp = 0xffffffffu;

struct Interval {
  int lo, hi;  // the keys lo <= j < hi; empty where lo >= hi

  FLAMINGO_DEVICE bool sees() const { return lo < hi; }
  FLAMINGO_DEVICE bool sees(int j) const { return lo <= j && j < hi; }
};

// Of one token, clamped to 0..K.
FLAMINGO_DEVICE Interval interval_at(const int32_t* start, const int32_t* end, int64_t token, int K) {
  return {max(load<int32_t>(start + token), 0), min(load<int32_t>(end + token), K)};
}

// What some rows see together.
struct Hull {
  int first, last;  // the smallest lo and the largest hi; 0 and 0 where they see nothing
  bool gaps;        // whether there may be keys in between that none of them sees

  FLAMINGO_DEVICE bool meets(int j, int keys) const { return first < j + keys && j < last; }
};

// Of `count` rows that lie side by side in shared memory. For a whole warp, which gets the same answer in all lanes.
//
// There are no gaps if the keys of every row that sees something, the first such row apart, touch those of the row
// before.
FLAMINGO_DEVICE Hull hull_of(const Interval* rows, int count) {
  int first = INT_MAX, last = 0, apart = 0;
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    const auto row = load_shared<Interval>(rows + i);
    if (!row.sees()) continue;
    first = min(first, row.lo);
    last = max(last, row.hi);
    const auto before = i > 0 ? load_shared<Interval>(rows + i - 1) : Interval{0, 0};
    apart += !(before.sees() && row.lo <= before.hi && before.lo <= row.hi);
  }
  last = __reduce_max_sync(kWarp, last);
  return {last > 0 ? __reduce_min_sync(kWarp, first) : 0, last, __reduce_add_sync(kWarp, apart) > 1};
}

// Whether any of the rows sees key j. Only asked where there are gaps: a key that no row sees must not be read, since 0
// times its NaN would be NaN.
FLAMINGO_DEVICE bool anyone_sees(const Interval* rows, int count, int j) {
  for (int i = 0; i < count; ++i) {
    if (load_shared<Interval>(rows + i).sees(j)) return true;
  }
  return false;
}

}  // namespace flamingo
