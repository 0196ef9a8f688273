// Tiles of rows in shared memory, and how a warp multiplies them.
//
// A tile holds rows of D elements in chunks of 16 bytes. Chunk c of row r lies where chunk c ^ swizzle(r) would, so
// that no access below meets a bank twice: neither eight rows of one chunk (ldmatrix, cp.async the other way round),
// nor two neighbouring chunks of four rows, be these consecutive or every second (the 4-byte and 8-byte accesses of
// fp32).
//
// Products of a warp have 16 rows, and their accumulators lie as those of mma m16n8: lane 4g + c holds, of columns
// 8n + 2c and 8n + 2c + 1, rows g and g + 8 in x[n][0..1] and x[n][2..3]. That holds for fp32 too, where there is no
// mma.
#pragma once

#include "cuda/attention.h"
#include "cuda/numbers.cuh"
#include "cuda/ptx.cuh"

namespace flamingo {

template <Precision P>
using Element =
    std::conditional_t<P == Precision::bf16, __nv_bfloat16, std::conditional_t<P == Precision::fp16, __half, float>>;

template <typename T, int columns>
struct Tile {
  static constexpr int kPerChunk = 16 / sizeof(T);
  static constexpr int kChunks = columns / kPerChunk;
  static_assert(columns % (4 * kPerChunk) == 0, "rows of whole groups of four chunks");

  T* data;

  static FLAMINGO_DEVICE int swizzle(int row) {
    if constexpr (kChunks % 8 == 0) {
      return ((row ^ row >> 2) & 3) << 1 | (row >> 2 & 1);
    } else {  // two rows fill the banks
      return row >> 1 & 3;
    }
  }
  static FLAMINGO_DEVICE int offset(int row, int chunk) { return (row * kChunks + (chunk ^ swizzle(row))) * kPerChunk; }
  FLAMINGO_DEVICE T* chunk(int row, int chunk) const { return data + offset(row, chunk); }
  FLAMINGO_DEVICE T* at(int row, int column) const { return chunk(row, column / kPerChunk) + column % kPerChunk; }
  FLAMINGO_DEVICE uint32_t address(int row, int chunk) const {
    return ptx::shared_address(data) + static_cast<uint32_t>(offset(row, chunk) * sizeof(T));
  }
  // The address of the chunk 2·pairs further on, by one operation on that of an even or odd chunk 0 or 1: tiles begin
  // on 128 bytes, so the bits that the swizzle turns are those of the address.
  static FLAMINGO_DEVICE uint32_t further(uint32_t address, int pairs) {
    constexpr int kPairs = kChunks % 8 == 0 ? 4 : 2;  // that the swizzle stays within
    return (address ^ pairs % kPairs * 32) + pairs / kPairs * kPairs * 32;
  }
  // Bytes from the tile's start to an element of chunk 0 or 1, which `further` takes on like an address; what lies
  // there.
  static FLAMINGO_DEVICE uint32_t place(int row, int column) {
    return static_cast<uint32_t>((offset(row, column / kPerChunk) + column % kPerChunk) * sizeof(T));
  }
  template <typename V>
  FLAMINGO_DEVICE V load_at(uint32_t place) const {
    return load_shared<V>(reinterpret_cast<const unsigned char*>(data) + place);
  }
  FLAMINGO_DEVICE Tile from_row(int row) const { return {data + row * columns}; }  // of a multiple of 8
};

// Copies `rows` rows of d <= D elements into a tile, with all of the block's threads, as part of the open cp.async
// group. source(row) points to a row in global memory, null for one that is to be zero.
template <int threads, int rows, typename T, int D, typename Source>
FLAMINGO_DEVICE void fetch(const Tile<T, D>& tile, int d, const Source& source) {
  constexpr int kChunks = Tile<T, D>::kChunks, kPerChunk = Tile<T, D>::kPerChunk;
#pragma unroll 1  // copies wait for nothing, and registers are scarce
  for (int i = threadIdx.x; i < rows * kChunks; i += threads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const T* const from = source(row);
    const bool exists = from != nullptr && chunk * kPerChunk < d;
    ptx::cp_async<16>(tile.address(row, chunk), exists ? from + chunk * kPerChunk : from, exists);
  }
}

// ---- products of a warp ---------------------------------------------------------------------------------------------

// d += a·b for the four registers of a, and b0, b1, that ldmatrix gives: 32 bytes of a contraction.
template <Precision P>
FLAMINGO_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (P == Precision::tf32) {
    ptx::mma_m16n8k8_tf32(d, a, b0, b1);
  } else {
    ptx::mma_m16n8k16<Element<P>>(d, a, b0, b1);
  }
}

template <Precision P, int n>
FLAMINGO_DEVICE void round_operand(uint32_t (&x)[n]) {
  if constexpr (P == Precision::tf32) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = ptx::to_tf32(bits_as<float>(x[i]));
  }
}

// acc [16, 8N] += a [16, D] · b [8N, D]ᵀ: the first rows of two tiles.
template <Precision P, int N, typename T, int D>
FLAMINGO_DEVICE void multiply_nt(float (&acc)[N][4], const Tile<T, D>& a, const Tile<T, D>& b) {
  const int lane = threadIdx.x % 32;
  if constexpr (P == Precision::fp32) {
    const int g = lane / 4, c = lane % 4;
#pragma unroll 1
    for (int chunk = 0; chunk < Tile<T, D>::kChunks; ++chunk) {
      const auto top = load_shared<Vector<T>>(a.chunk(g, chunk)), low = load_shared<Vector<T>>(a.chunk(g + 8, chunk));
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const auto column = load_shared<Vector<T>>(b.chunk(8 * n + 2 * c + j, chunk));
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            acc[n][j] = fmaf(top[e], column[e], acc[n][j]);
            acc[n][2 + j] = fmaf(low[e], column[e], acc[n][2 + j]);
          }
        }
      }
    }
  } else {
    static_assert(N % 2 == 0);
    const uint32_t rows = a.address(lane % 16, lane / 16), columns = b.address(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll 2  // more would be prefetched into registers that callers need
    for (int step = 0; step < Tile<T, D>::kChunks / 2; ++step) {
      uint32_t x[4];
      ptx::ldmatrix_x4(x, a.further(rows, step));
      round_operand<P>(x);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t y[4];
        ptx::ldmatrix_x4(y, b.further(columns, step) + n * 8 * D * sizeof(T));
        round_operand<P>(y);
        mma<P>(acc[n], x, y[0], y[1]);
        mma<P>(acc[n + 1], x, y[2], y[3]);
      }
    }
  }
}

// The second operand of a product a · b with b [.., columns] stored by rows, and 32 bytes of the contraction: 16 rows
// of 16-bit elements or 8 of fp32, from `row`. Fills acc [16, 8N] from the column 8·first on.
template <Precision P, int N, typename T, int D>
FLAMINGO_DEVICE void multiply_rows(float (&acc)[N][4], const uint32_t (&x)[4], const Tile<T, D>& b, int row,
                                   int first) {
  const int lane = threadIdx.x % 32;
  if constexpr (P == Precision::tf32) {
    const uint32_t even = b.place(row + lane % 4 * 2, lane / 4), odd = b.place(row + lane % 4 * 2 + 1, lane / 4);
#pragma unroll
    for (int n = 0; n < N; ++n) {  // the columns of x are in the order 0 2 4 6 1 3 5 7
      uint32_t y[2];
      y[0] = b.template load_at<uint32_t>(b.further(even, first + n));
      y[1] = b.template load_at<uint32_t>(b.further(odd, first + n));
      round_operand<P>(y);
      mma<P>(acc[n], x, y[0], y[1]);
    }
  } else {
    static_assert(N % 2 == 0);
    const uint32_t rows = b.address(lane % 16, lane / 16) + row * D * sizeof(T);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t y[4];
      ptx::ldmatrix_x4_trans(y, b.further(rows, (first + n) / 2));
      mma<P>(acc[n], x, y[0], y[1]);
      mma<P>(acc[n + 1], x, y[2], y[3]);
    }
  }
}

// One step of fp32: acc [16, 8N] += (top of row g, low of row g + 8) · b[row], from the column 8·first on.
template <int N, int D>
FLAMINGO_DEVICE void multiply_row(float (&acc)[N][4], float top, float low, const Tile<float, D>& b, int row,
                                  int first) {
  const uint32_t start = b.place(row, threadIdx.x % 4 * 2);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const auto y = b.template load_at<Vector<float, 2>>(b.further(start, first + n));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      acc[n][j] = fmaf(top, y[j], acc[n][j]);
      acc[n][2 + j] = fmaf(low, y[j], acc[n][2 + j]);
    }
  }
}

// A product's accumulators [16, 8N] in the elements' format, as the first operand of another product.
template <Precision P, int N>
struct Operand {
  static constexpr int kSteps = sizeof(Element<P>) == 2 ? N / 2 : N;  // of 32 bytes of the contraction
  uint32_t x[kSteps][4];

  FLAMINGO_DEVICE explicit Operand(const float (&p)[N][4]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if constexpr (sizeof(Element<P>) == 2) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          x[i][j] = pack<Element<P>>(p[2 * i + j / 2][j % 2 * 2], p[2 * i + j / 2][j % 2 * 2 + 1]);
        }
      } else {  // the columns in the order 0 2 4 6 1 3 5 7
#pragma unroll
        for (int j = 0; j < 4; ++j) x[i][j] = bits_as<uint32_t>(p[i][j / 2 + j % 2 * 2]);
        round_operand<P>(x[i]);
      }
    }
  }
};

// acc [16, D] += p [16, 8N] · b [8N, D].
template <Precision P, int N, typename T, int D>
FLAMINGO_DEVICE void multiply_nn(float (&acc)[D / 8][4], const Operand<P, N>& p, const Tile<T, D>& b) {
  if constexpr (P == Precision::fp32) {
    const int quad = threadIdx.x % 32 & ~3;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll 1
        for (int c = 0; c < 4; ++c) {
          const float top = bits_as<float>(__shfl_sync(0xffffffffu, p.x[n][2 * j], quad + c));
          const float low = bits_as<float>(__shfl_sync(0xffffffffu, p.x[n][2 * j + 1], quad + c));
          multiply_row(acc, top, low, b, 8 * n + 2 * c + j, 0);
        }
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < Operand<P, N>::kSteps; ++i)
      multiply_rows<P>(acc, p.x[i], b, 8 * N / Operand<P, N>::kSteps * i, 0);
  }
}

// acc [16, 8N] += aᵀ · b, with a [rows, 16 from a_column] and b [rows, 8N from b_column] stored by rows.
template <Precision P, int rows, int N, typename T, int A, int D>
FLAMINGO_DEVICE void multiply_tn(float (&acc)[N][4], const Tile<T, A>& a, int a_column, const Tile<T, D>& b,
                                 int b_column) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  if constexpr (P == Precision::fp32) {
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      const float top = load_shared<float>(a.at(row, a_column + g)),
                  low = load_shared<float>(a.at(row, a_column + g + 8));
      multiply_row(acc, top, low, b, row, b_column / 8);
    }
  } else if constexpr (P == Precision::tf32) {
#pragma unroll 2
    for (int row = 0; row < rows; row += 8) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = load_shared<uint32_t>(a.at(row + 2 * c + i / 2, a_column + g + i % 2 * 8));
      round_operand<P>(x);
      multiply_rows<P>(acc, x, b, row, b_column / 8);
    }
  } else {
#pragma unroll 2
    for (int row = 0; row < rows; row += 16) {
      uint32_t x[4];
      ptx::ldmatrix_x4_trans(x, a.address(row + lane % 8 + lane / 16 * 8, a_column / 8 + lane / 8 % 2));
      multiply_rows<P>(acc, x, b, row, b_column / 8);
    }
  }
}

// ---- accumulators to memory -----------------------------------------------------------------------------------------

// A product's accumulators times `scale` of their row, into 16 rows of a tile from `column` on, as elements.
template <int N, typename T, int D>
FLAMINGO_DEVICE void put(const Tile<T, D>& tile, const float (&acc)[N][4], int column, float scale_top,
                         float scale_low) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = half ? scale_low : scale_top;
      Vector<T, 2> pair;
      pair.set(0, acc[n][2 * half] * scale);
      pair.set(1, acc[n][2 * half + 1] * scale);
      store_shared(tile.at(g + 8 * half, column + 8 * n + 2 * c), pair);
    }
  }
}

// The columns from `first` to `first + columns`, or to d <= D, of `rows` rows of a tile to global memory, by a warp or
// by `threads` that begin on a multiple of that. to(row) points to a row there, null for one to leave out.
template <int rows, int columns, int threads = 32, typename T, int D, typename Target>
FLAMINGO_DEVICE void flush(const Tile<T, D>& tile, int d, int first, const Target& to) {
  constexpr int kPerChunk = Tile<T, D>::kPerChunk, kChunks = columns / kPerChunk;
#pragma unroll 2
  for (int i = threadIdx.x % threads; i < rows * kChunks; i += threads) {
    const int row = i / kChunks, column = first + i % kChunks * kPerChunk;
    T* const target = to(row);
    if (target == nullptr || column >= d) continue;
    store(target + column, load_shared<Vector<T>>(tile.at(row, column)));
  }
}

}  // namespace flamingo
