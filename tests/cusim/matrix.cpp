// mma.sync of a whole warp, and the banks of ldmatrix.
#include "matrix.h"

#include <algorithm>

#include "arithmetic.h"
#include "counters.h"

namespace cusim {
namespace {

struct Fragments {  // of a lane
  float d[4];
  uint32_t a[4], b[2];
};

struct Bf16 {
  static constexpr int per_register = 2;
  static float value(uint32_t bits, int i) { return bits_as<float>((bits >> 16 * i) << 16); }
};

struct Fp16 {
  static constexpr int per_register = 2;
  static float value(uint32_t bits, int i) {
    __half_raw raw;
    raw.x = static_cast<unsigned short>(bits >> 16 * i);
    return __half2float(__half(raw));
  }
};

struct Tf32 {
  static constexpr int per_register = 1;
  static float value(uint32_t bits, int) { return bits_as<float>(bits & 0xffffe000u); }
};

// Lane 4 g + c holds, of a: rows g and g + 8, of b: column g, of d: rows g and g + 8 and columns 2 c and 2 c + 1. A
// register's elements of the inner axis are P c ..., and P (c + 4) ... in the second half of the registers.
template <class T>
void multiply(Slots& slots) {
  constexpr int P = T::per_register, K = 8 * P;
  double a[16][K], b[K][8];
  Fragments lanes[32];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, c = lane % 4;
    Fragments& mine = lanes[lane];
    memcpy(&mine, slots.lane[lane], sizeof(mine));
    for (int p = 0; p < P; p++) {
      for (int i = 0; i < 4; i++) a[g + 8 * (i % 2)][P * (c + 4 * (i / 2)) + p] = T::value(mine.a[i], p);
      for (int i = 0; i < 2; i++) b[P * (c + 4 * i) + p][g] = T::value(mine.b[i], p);
    }
  }
  for (int row = 0; row < 16; row++) {
    double sums[8];
    for (int column = 0; column < 8; column++)
      sums[column] = lanes[row % 8 * 4 + column / 2].d[row / 8 * 2 + column % 2];
    for (int k = 0; k < K; k++)
      for (int column = 0; column < 8; column++) sums[column] += a[row][k] * b[k][column];
    for (int column = 0; column < 8; column++)
      lanes[row % 8 * 4 + column / 2].d[row / 8 * 2 + column % 2] = static_cast<float>(sums[column]);
  }
  for (int lane = 0; lane < 32; lane++) memcpy(slots.lane[lane], lanes[lane].d, sizeof(lanes[lane].d));
  counters.mma++;
}

}  // namespace

void mma(Operand operand, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  Fragments mine;
  memcpy(mine.d, d, sizeof(d));
  memcpy(mine.a, a, sizeof(a));
  memcpy(mine.b, b, sizeof(b));
  static constexpr struct {
    const char* name;
    Combine combine;
  } kinds[] = {{"mma.bf16", multiply<Bf16>}, {"mma.fp16", multiply<Fp16>}, {"mma.tf32", multiply<Tf32>}};
  const auto& kind = kinds[static_cast<int>(operand)];
  const Slots& result = collective(0xffffffffu, kind.name, &mine, sizeof(mine), kind.combine, site);
  memcpy(d, result.lane[current->lane], sizeof(d));
}

void count_ldmatrix(const Slots& addresses, int matrices) {
  for (int matrix = 0; matrix < matrices; matrix++) {
    int worst = 1;
    for (uint32_t bank_group = 0; bank_group < 8; bank_group++) {  // of the 16 bytes of a row
      uint32_t rows[8];
      int count = 0;
      for (int row = 0; row < 8; row++) {
        uint32_t address;
        memcpy(&address, addresses.lane[8 * matrix + row], sizeof(address));
        if (address / 16 % 8 != bank_group) continue;
        if (std::find(rows, rows + count, address) == rows + count) rows[count++] = address;
      }
      worst = std::max(worst, count);
    }
    counters.ldmatrix_wavefronts += worst;
    counters.ldmatrix_least++;
  }
  counters.ldmatrix++;
}

}  // namespace cusim
