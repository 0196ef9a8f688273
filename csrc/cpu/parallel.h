// Spreads independent items over ATen's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace flamingo {

// Each thread makes a worker with make_worker() and calls it with the items it takes, one after the other, until none
// is left: items differ in cost, and other work on the machine makes threads differ in speed. Which thread does an item
// does not change its result. `threads`: at most so many.
template <typename MakeWorker>
void for_each_item(int64_t items, int64_t threads, const MakeWorker& make_worker) {
  threads = std::min<int64_t>({items, threads, at::get_num_threads()});
  if (threads <= 0) return;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto&& worker = make_worker();
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) worker(item);
  });
}

}  // namespace flamingo
