// All of the PTX that the kernels contain, and what the emulator runs in its place. Fragments lie in registers as the
// PTX manual draws them: lane = 4·g + c holds, of the accumulator of m16n8, rows g and g + 8, columns 2c and 2c + 1.
#pragma once

#include "cuda/platform.cuh"

namespace flamingo::ptx {

#ifdef FLAMINGO_EMULATED

using cusim::cp_async_commit;
using cusim::ldmatrix_x4;
using cusim::ldmatrix_x4_trans;
using cusim::mma_m16n8k16;
using cusim::mma_m16n8k8_tf32;
using cusim::shared_address;
using Site = cusim::Site;

template <int bytes>
inline void cp_async(uint32_t destination, const void* source, bool exists, Site site = Site::here()) {
  cusim::cp_async(destination, source, bytes, exists ? bytes : 0, site);
}
template <int groups_left>
inline void cp_async_wait() {
  cusim::cp_async_wait(groups_left);
}
inline float exp2(float x) { return ::exp2f(x); }
inline uint32_t to_tf32(float x) {  // to the nearest, ties away from zero; a NaN stays one
  return x == x ? (__float_as_uint(x) + 0x1000u) & ~0x1fffu : 0x7fffffffu;
}

#else

// The 32-bit address of something in shared memory.
FLAMINGO_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies 4 or 16 bytes to shared memory, or zeros where they do not exist: `source` is then not read.
template <int bytes>
FLAMINGO_DEVICE void cp_async(uint32_t destination, const void* source, bool exists) {
  static_assert(bytes == 4 || bytes == 16);
  const int size = exists ? bytes : 0;
  if constexpr (bytes == 16) {  // past L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source), "r"(size) : "memory");
  }
}

FLAMINGO_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `groups_left` of this thread's groups are under way.
template <int groups_left>
FLAMINGO_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

// Four matrices of 8 rows of 16 bytes. Lane 8i + r names row r of matrix i, which then lies in x[i].
FLAMINGO_DEVICE void ldmatrix_x4(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

FLAMINGO_DEVICE void ldmatrix_x4_trans(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// d += a·b, fp32 sums of products of bf16 or fp16.
template <typename T>
FLAMINGO_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
FLAMINGO_DEVICE void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
FLAMINGO_DEVICE void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

FLAMINGO_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 8 or 16 bytes of global memory as one; what a compiler stores of a struct may come in pieces.
FLAMINGO_DEVICE void store_global(void* to, const uint2& x) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y) : "memory");
}

FLAMINGO_DEVICE void store_global(void* to, const uint4& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

FLAMINGO_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FLAMINGO_DEVICE uint32_t to_tf32(float x) {  // to the nearest; what mma does by itself is to cut off
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

#endif

}  // namespace flamingo::ptx
