// What the emulator makes of CUDA's functions, against plain loops.
#include <cmath>
#include <cstring>
#include <vector>

#include "case.h"
#include "counters.h"

namespace {

bool launch(unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  cusim::launch("right", dim3(1), dim3(threads), shared_bytes, kernel);
  return true;
}

bool right;  // of the case that runs; threads run one at a time
#define CHECK(condition) \
  if (!(condition)) right = false, printf("line %d: lane %u\n", __LINE__, threadIdx.x)

CASE(shuffles) {
  right = true;
  launch(64, 0, [] {
    const int lane = static_cast<int>(threadIdx.x) % 32, part = lane / 8 * 8;
    const uint32_t all = 0xffffffffu;
    CHECK(__shfl_sync(all, lane * 3, 5) == 15);
    CHECK(__shfl_sync(all, lane, 33) == 1);
    CHECK(__shfl_sync(all, lane, lane + 1, 8) == part + (lane + 1) % 8);
    CHECK(__shfl_xor_sync(all, lane + .5f, 4) == (lane ^ 4) + .5f);
    CHECK(__shfl_xor_sync(all, lane, 16, 8) == (lane < 16 ? lane : lane - 16));
    CHECK(__shfl_up_sync(all, lane, 3u) == (lane < 3 ? lane : lane - 3));
    CHECK(__shfl_up_sync(all, lane, 3u, 8) == (lane % 8 < 3 ? lane : lane - 3));
    CHECK(__shfl_down_sync(all, lane, 3u, 8) == (lane % 8 > 4 ? lane : lane + 3));
    CHECK(__shfl_xor_sync(all, int64_t{lane} << 40, 1) == int64_t{lane ^ 1} << 40);
    CHECK(__bfloat162float(__shfl_xor_sync(all, __float2bfloat16_rn(static_cast<float>(lane)), 1)) == (lane ^ 1));
  });
  return right;
}

CASE(votes_and_reductions) {
  right = true;
  launch(40, 0, [] {  // the second warp has 8 lanes
    const unsigned lane = threadIdx.x % 32, lanes = threadIdx.x < 32 ? 32 : 8;
    const uint32_t all = lanes == 32 ? 0xffffffffu : 0xffu;
    CHECK(__ballot_sync(all, lane % 2) == (all & 0xaaaaaaaau));
    CHECK(__any_sync(all, lane == 7) && !__any_sync(all, lane == 40));
    CHECK(__all_sync(all, lane < 32) && !__all_sync(all, lane != 3));
    CHECK(__reduce_add_sync(all, lane) == lanes * (lanes - 1) / 2);
    CHECK(__reduce_max_sync(all, -static_cast<int>(lane)) == 0);
    CHECK(__reduce_min_sync(all, -static_cast<int>(lane)) == 1 - static_cast<int>(lanes));
    CHECK(__reduce_or_sync(all, 1u << lane) == all && __reduce_xor_sync(all, 1u << lane) == all);
    CHECK(__reduce_and_sync(all, ~(1u << lane)) == ~all);
    if (lane >= 4) return;
    CHECK(__reduce_add_sync(0xfu, lane) == 6);
  });
  return right;
}

CASE(indices) {
  right = true;
  std::vector<int> seen(2 * 3 * 4 * 5 * 2);
  cusim::launch("indices", dim3(2, 3), dim3(4, 5, 2), 0, [&] {
    CHECK(gridDim.x == 2 && gridDim.y == 3 && gridDim.z == 1 && blockDim.x == 4 && blockDim.y == 5 && blockDim.z == 2);
    const unsigned thread = (threadIdx.z * 5 + threadIdx.y) * 4 + threadIdx.x;
    seen[(blockIdx.y * 2 + blockIdx.x) * 40 + thread]++;
  });
  for (const int times : seen) right &= times == 1;
  return right;
}

CASE(shared_memory_is_new_for_each_block) {
  right = true;
  cusim::launch("new", dim3(3), dim3(32), 128, [] {
    CHECK(std::isnan(shared<float>()[threadIdx.x]));
    __syncwarp();
    shared<float>()[threadIdx.x] = 0.f;
  });
  return right;
}

CASE(copies) {  // land at the wait, the missing bytes as zeros
  right = true;
  alignas(16) static const float from[4] = {1, 2, 3, 4};
  launch(32, 32 * 32, [] {
    float* const mine = shared<float>() + threadIdx.x * 8;
    const uint32_t address = cusim::shared_address(mine);
    for (int i = 0; i < 8; i++) mine[i] = 7;
    cusim::cp_async(address, from, 16, 8);
    cusim::cp_async_commit();
    cusim::cp_async(address + 16, from + 2, 8, 8);
    cusim::cp_async(address + 24, from, 4, 4);
    cusim::cp_async_commit();
    CHECK(std::isnan(mine[0]) && std::isnan(mine[3]) && std::isnan(mine[6]) && mine[7] == 7);
    cusim::cp_async_wait(1);
    CHECK(mine[0] == 1 && mine[1] == 2 && mine[2] == 0 && mine[3] == 0 && std::isnan(mine[4]));
    cusim::cp_async_wait(0);
    CHECK(mine[4] == 3 && mine[5] == 4 && mine[6] == 1 && mine[7] == 7);
    cusim::cp_async(address, from + 1, 4, 0);
    cusim::cp_async_wait(0);
    CHECK(std::isnan(mine[0]));  // of no group yet
    cusim::cp_async_wait_all();
    CHECK(mine[0] == 0);
  });
  return right;
}

CASE(transposed_ldmatrix) {
  right = true;
  launch(32, 512, [] {
    const unsigned lane = threadIdx.x;
    for (unsigned i = 0; i < 8; i++) shared<uint16_t>()[lane * 8 + i] = static_cast<uint16_t>(lane * 8 + i);
    __syncwarp();
    uint32_t rows[4], columns[4];
    const uint32_t address = cusim::shared_address(shared<char>()) + lane * 16;
    cusim::ldmatrix_x4(rows, address);
    cusim::ldmatrix_x4_trans(columns, address);
    for (unsigned matrix = 0; matrix < 4; matrix++)
      for (unsigned half = 0; half < 2; half++) {
        const unsigned row = lane / 4, column = lane % 4 * 2 + half;
        CHECK((rows[matrix] >> 16 * half & 0xffff) == matrix * 64 + row * 8 + column);
        CHECK((columns[matrix] >> 16 * half & 0xffff) == matrix * 64 + column * 8 + row);
      }
  });
  return right && cusim::counters.ldmatrix == 2 && cusim::counters.ldmatrix_wavefronts == 8;
}

// d = c + a b, of whole numbers that every format holds.
float a_of(int row, int k) { return static_cast<float>((row * 5 + k * 3) % 13 - 6); }
float b_of(int k, int column) { return static_cast<float>((k * 7 + column * 11) % 17 - 8); }
float c_of(int row, int column) { return static_cast<float>(row - 2 * column); }

template <class T>
uint32_t pair(float low, float high) {
  const T both[2] = {T(low), T(high)};
  uint32_t bits;
  memcpy(&bits, both, sizeof(bits));
  return bits;
}

template <class T>
bool product() {
  constexpr bool tf32 = std::is_same_v<T, float>;
  constexpr int inner = tf32 ? 8 : 16;
  right = true;
  launch(32, 0, [] {
    const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
    uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; i++) {
      const int row = g + i % 2 * 8;
      if constexpr (tf32)
        a[i] = __float_as_uint(a_of(row, t + i / 2 * 4)) | 0x1fffu;  // the last bits are not read
      else
        a[i] = pair<T>(a_of(row, 2 * t + i / 2 * 8), a_of(row, 2 * t + 1 + i / 2 * 8));
      d[i] = c_of(g + i / 2 * 8, 2 * t + i % 2);
    }
    for (int i = 0; i < 2; i++) {
      if constexpr (tf32)
        b[i] = __float_as_uint(b_of(t + i * 4, g));
      else
        b[i] = pair<T>(b_of(2 * t + i * 8, g), b_of(2 * t + 1 + i * 8, g));
    }
    if constexpr (tf32)
      cusim::mma_m16n8k8_tf32(d, a, b[0], b[1]);
    else
      cusim::mma_m16n8k16<T>(d, a, b[0], b[1]);
    for (int i = 0; i < 4; i++) {
      const int row = g + i / 2 * 8, column = 2 * t + i % 2;
      float sum = c_of(row, column);
      for (int k = 0; k < inner; k++) sum += a_of(row, k) * b_of(k, column);
      CHECK(d[i] == sum);
    }
  });
  return right && cusim::counters.mma == 1;
}
CASE(product_of_bf16) { return product<__nv_bfloat16>(); }
CASE(product_of_fp16) { return product<__half>(); }
CASE(product_of_tf32) { return product<float>(); }

CASE(arithmetic) {
  right = true;
  launch(1, 0, [] {
    CHECK(__byte_perm(0x33221100u, 0x77665544u, 0x5140u) == 0x55114400u);
    CHECK(__brev(1u) == 0x80000000u && __clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4 && __popc(7u) == 3);
    CHECK(__umulhi(0x80000000u, 6u) == 3u && __mulhi(-0x40000000, 8) == -2);
    CHECK(__float2int_rn(2.5f) == 2 && __float2int_rd(-1.5f) == -2 && __float2int_ru(1.2f) == 2);
    CHECK(rsqrtf(4.f) == .5f && __saturatef(NAN) == 0.f && __saturatef(2.f) == 1.f && __saturatef(.25f) == .25f);
  });
  return right;
}

CASE(banks_and_sectors) {
  static float global[32 * 32];
  cusim::counters = {};
  launch(32, 32 * 32 * 4, [] {
    const unsigned lane = threadIdx.x;
    const float* const memory = shared<float>();
    cusim::shared_load(memory + lane, 4);                // 1 pass
    cusim::shared_load(memory + lane * 2, 4);            // 2
    cusim::shared_load(memory + lane * 32, 4);           // 32
    cusim::shared_load(memory, 4);                       // 1: all want the same word
    cusim::shared_store(memory + lane * 4, 16);          // 4, and no fewer are possible
    cusim::shared_store(memory + lane % 8 * 32, 16);     // 4 x 8
    if (lane < 8) cusim::shared_load(memory + lane, 4);  // 1
    cusim::global_load(global + lane, 4);                // 4 sectors
    cusim::global_load(global + lane * 32, 4);           // 32
    __syncwarp();
    for (unsigned i = 0; i <= lane % 2; i++) cusim::global_store(global + lane, 4);  // 4, and 4 by half the lanes
  });
  const cusim::Counters& c = cusim::counters;
  return c.shared_wavefronts == 1 + 2 + 32 + 1 + 4 + 32 + 1 && c.shared_least == 4 + 4 + 4 + 1 &&
         c.global_sectors_read == 4 + 32 && c.global_bytes_read == 256 && c.global_sectors_written == 4 + 4 &&
         c.global_bytes_written == 48 * 4;
}

}  // namespace
