// Errors planted on purpose, in the manner of our kernels: a sanitizer that reports none of them proves nothing. Beside
// each race stands the same without one, of which nothing may be reported. Compiled into the sanitized extension only.

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/zeros.h>

#include <cstdint>
#include <limits>
#include <mutex>
#include <numeric>

#include "cpu/parallel.h"

namespace {

constexpr int64_t kThreads = 4;
std::mutex mutex;

// Calls do(item) for as many items as threads; each thread calls it at least once, since it makes a worker.
template <typename Do>
void in_every_thread(const Do& act) {
  flamingo::for_each_item(kThreads, kThreads, [&] {
    act();
    return [](int64_t) {};
  });
}

}  // namespace

#define PLANTED extern "C" __attribute__((visibility("default"))) void

PLANTED race_of_stores() {
  int64_t workers = 0;
  in_every_thread([&] { ++workers; });
}

PLANTED race_of_matmuls() {
  const at::Tensor a = at::zeros({8, 8}), b = at::zeros({8, 8}), c = at::zeros({8, 8});
  in_every_thread([&] {
    at::native::cpublas::brgemm(8, 8, 8, 8, 8, 8, true, a.const_data_ptr<float>(), b.const_data_ptr<float>(),
                                c.mutable_data_ptr<float>(), false);
  });
}

// What a caller writes before a region its threads read, and what they write one after the other or apart from each
// other is read by the caller after it; scratch memory is used again.
PLANTED no_race() {
  for (int turn = 0; turn < 3; ++turn) {
    at::Tensor out = at::zeros({kThreads, 8}), a = at::zeros({8, 8}), b = at::zeros({8, 8});
    a.fill_(turn);
    a.mutable_data_ptr<float>()[0] = 1;
    int64_t workers = 0;
    in_every_thread([&] {
      const std::lock_guard<std::mutex> lock(mutex);
      ++workers;
    });
    flamingo::for_each_item(kThreads, kThreads, [&] {
      return [&](int64_t item) {
        at::native::cpublas::brgemm(1, 8, 8, 8, 8, 8, true, a.const_data_ptr<float>(), b.const_data_ptr<float>(),
                                    out.mutable_data_ptr<float>() + 8 * item, false);
        out.mutable_data_ptr<float>()[8 * item] += static_cast<float>(workers);
      };
    });
    const float* row = out.const_data_ptr<float>();
    if (std::accumulate(row, row + 8 * kThreads, 0.f) != kThreads * kThreads) __builtin_trap();
  }
}

PLANTED read_past_the_end() {
  const at::Tensor x = at::zeros({16});
  volatile float seen = x.const_data_ptr<float>()[x.numel()];
  (void)seen;
}

PLANTED signed_overflow() {
  volatile int32_t most = std::numeric_limits<int32_t>::max();
  most = most + 1;
}
