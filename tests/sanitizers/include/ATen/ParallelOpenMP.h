// Stands in for ATen's header of this name where our kernels are compiled with ThreadSanitizer. libgomp is not
// instrumented: the sanitizer sees neither its barriers nor its threads' start, and would call every use of the results
// of a parallel region a race. Here a region's threads are std::thread, whose start and join it knows, so that what it
// reports happened inside a region without an order. What runs in the region is the code that ships.
#pragma once

#if !defined(__SANITIZE_THREAD__)
#include_next <ATen/ParallelOpenMP.h>
#else

#include <algorithm>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#define INTRA_OP_PARALLEL  // for ATen/Parallel-inl.h

namespace at::internal {

// f on equal chunks of begin .. end, each in a thread, the first in the caller's; a region inside a region is serial.
template <typename F>
inline void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  static thread_local bool inside = false;
  if (inside) return f(begin, end);
  int64_t count = at::get_num_threads();
  if (grain_size > 0) count = std::min(count, divup(end - begin, grain_size));
  const int64_t chunk = divup(end - begin, count);

  std::mutex mutex;
  std::exception_ptr error;
  const auto run = [&](int64_t thread) {
    const int64_t first = begin + thread * chunk;
    if (first >= end) return;
    inside = true;
    try {
      ThreadIdGuard id(thread);
      f(first, std::min(end, first + chunk));
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
    inside = false;
  };
  std::vector<std::thread> threads;
  for (int64_t thread = 1; thread < count; ++thread) threads.emplace_back(run, thread);
  run(0);
  for (std::thread& thread : threads) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace at::internal

#endif
