// ldmatrix and mma.sync, as the fragments of the PTX manual lie in a warp's registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "memory.h"

namespace cusim {

// Counts the rows of each 8 x 8 matrix that lie in the same banks.
void count_ldmatrix(const Slots& addresses, int matrices);

// `count` matrices of 8 x 8 16-bit elements. Lane 8 i + r names the 16 bytes of row r of matrix i; lanes beyond name
// nothing.
template <bool transposed, int count>
inline void ldmatrix(uint32_t (&registers)[count], uint32_t address, Site site) {
  static_assert(count == 1 || count == 2 || count == 4);
  const char* operation = transposed ? "ldmatrix.trans" : "ldmatrix";
  const int lane = current->lane;
  if (lane < 8 * count && address % 16)
    fail("%s:%d: %s: the row at shared address %u does not lie on 16 bytes", site.file, site.line, operation, address);
  const Slots& addresses = collective(0xffffffffu, operation, &address, sizeof(address), nullptr, site);
  if (lane == 0) count_ldmatrix(addresses, count);
  for (int matrix = 0; matrix < count; matrix++) {
    uint16_t pair[2];
    for (int j = 0; j < 2; j++) {
      const int row = transposed ? lane % 4 * 2 + j : lane / 4;
      const int column = transposed ? lane / 4 : lane % 4 * 2 + j;
      uint32_t start;
      memcpy(&start, addresses.lane[8 * matrix + row], sizeof(start));
      pair[j] = static_cast<const uint16_t*>(shared_pointer(start, 16, operation, site))[column];
    }
    registers[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

inline void ldmatrix_x4(uint32_t (&registers)[4], uint32_t address, Site site = Site::here()) {
  ldmatrix<false>(registers, address, site);
}
inline void ldmatrix_x4_trans(uint32_t (&registers)[4], uint32_t address, Site site = Site::here()) {
  ldmatrix<true>(registers, address, site);
}
inline void ldmatrix_x2(uint32_t (&registers)[2], uint32_t address, Site site = Site::here()) {
  ldmatrix<false>(registers, address, site);
}
inline void ldmatrix_x2_trans(uint32_t (&registers)[2], uint32_t address, Site site = Site::here()) {
  ldmatrix<true>(registers, address, site);
}

enum class Operand { bf16, fp16, tf32 };

// d += a b of a whole warp. A register of 16-bit operands holds two columns of a row, one of tf32 a single one.
// Products are exact and a sum is rounded once, where a tensor core cuts bits off in an order of its own.
void mma(Operand operand, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::here()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  mma(std::is_same_v<T, __half> ? Operand::fp16 : Operand::bf16, d, a, {b0, b1}, site);
}

// Of an operand the last 13 bits are not read, as on a chip.
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             Site site = Site::here()) {
  mma(Operand::tf32, d, a, {b0, b1}, site);
}

}  // namespace cusim
