// Spreads independent items over ATen's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

namespace flamingo {

// Each thread makes a worker with make_worker() and calls it with the items it takes, one after the other, until none
// is left: items differ in cost, and other work on the machine makes threads differ in speed. Which thread does an item
// does not change its result. `threads`: at most so many. A worker of two arguments is also told which item it gets
// next, or -1, so that it can ask for its memory.
template <typename MakeWorker>
void for_each_item(int64_t items, int64_t threads, const MakeWorker& make_worker) {
  threads = std::min<int64_t>({items, threads, at::get_num_threads()});
  if (threads <= 0) return;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto&& worker = make_worker();
    const auto take = [&] {
      const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      return item < items ? item : -1;
    };
    if constexpr (std::is_invocable_v<decltype(worker), int64_t, int64_t>) {
      for (int64_t item = take(); item >= 0;) {
        const int64_t following = take();
        worker(item, following);
        item = following;
      }
    } else {
      for (int64_t item; (item = take()) >= 0;) worker(item);
    }
  });
}

}  // namespace flamingo
