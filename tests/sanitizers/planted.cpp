// Errors planted on purpose, in the manner of our kernels: a sanitizer that reports none of them proves nothing. Beside
// each race stands the same without one, of which nothing may be reported. Compiled into the sanitized extension only.

#define CPU_CAPABILITY DEFAULT
#define CPU_CAPABILITY_DEFAULT

#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <numeric>

#include "cpu/parallel.h"
#include "cpu/tiles.h"

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

template <typename T>
void race_on_a_product(at::ScalarType type) {
  const at::Tensor a = at::zeros({8, 8}, type), b = at::zeros({8, 8}, type), c = at::zeros({8, 8}, type);
  in_every_thread([&] {
    flamingo::DEFAULT::matmul(8, 8, 8, a.const_data_ptr<T>(), 8, b.const_data_ptr<T>(), 8, c.mutable_data_ptr<T>(), 8,
                              true);
  });
}

PLANTED race_of_matmuls() { race_on_a_product<float>(at::kFloat); }
PLANTED race_of_matmuls_in_fp64() { race_on_a_product<double>(at::kDouble); }

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
        flamingo::DEFAULT::matmul(1, 8, 8, a.const_data_ptr<float>(), 8, b.const_data_ptr<float>(), 8,
                                  out.mutable_data_ptr<float>() + 8 * item, 8, true);
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

PLANTED write_past_a_piece_of_scratch() {
  flamingo::DEFAULT::Arena arena;
  float* first = nullptr;
  for (int turn = 0; turn < 2; ++turn) {
    first = arena.take<float>(16);
    arena.take<float>(16);
    if (turn == 0) arena.allocate();
  }
  static_cast<volatile float*>(first)[16] = 1;
}

PLANTED matmul_past_the_end() {
  const at::Tensor a = at::zeros({8, 8}), b = at::zeros({8, 8}), c = at::zeros({7, 8});
  flamingo::DEFAULT::matmul(8, 8, 8, a.const_data_ptr<float>(), 8, b.const_data_ptr<float>(), 8,
                            c.mutable_data_ptr<float>(), 8, false);
}

PLANTED matmul_in_fp64_past_the_end() {
  const at::Tensor a = at::zeros({8, 8}, at::kDouble), b = at::zeros({7, 8}, at::kDouble), c = at::zeros_like(a);
  flamingo::DEFAULT::matmul(8, 8, 8, a.const_data_ptr<double>(), 8, b.const_data_ptr<double>(), 8,
                            c.mutable_data_ptr<double>(), 8, false);
}

PLANTED copy_from_null() {
  void* volatile nothing = nullptr;
  char out[1];
  std::memcpy(out, nothing, reinterpret_cast<uintptr_t>(nothing));
}

PLANTED signed_overflow() {
  volatile int32_t most = std::numeric_limits<int32_t>::max();
  most = most + 1;
}
