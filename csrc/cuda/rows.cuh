// What the kernels on rows share: which columns of a row a thread has, how it loads and stores them, and sums over the
// threads that share a row.
//
// Threads load and store groups of G columns side by side. G is 16 bytes of the widest type among a kernel's rows, if
// every row begins on 16 bytes and is made of whole groups, and else 1; neighbours in a warp have neighbouring groups,
// so that an instruction moves whole sectors.
#pragma once

#include <algorithm>

#include "cuda/numbers.cuh"
#include "cuda/rows.h"

namespace flamingo {

// ---- columns ------------------------------------------------------------------------------------------------------

// The N columns that a thread has of the `size · N` from `first` on. N <= 32.
template <int N, int G>
struct Columns {
  int rank, size;  // of the thread among those that share the row, and their number
  int first;
  int count;  // of the row

  FLAMINGO_DEVICE int at(int i) const { return first + (i / G * size + rank) * G + i % G; }
  // Bit i says whether column i is there.
  FLAMINGO_DEVICE uint32_t mask() const {
    uint32_t bits = 0;
#pragma unroll
    for (int g = 0; g < N; g += G) bits |= at(g) < count ? ((1u << G) - 1) << g : 0u;
    return bits;
  }
};

template <int G, typename T>
FLAMINGO_DEVICE void load_group(float* x, const T* from) {
  constexpr int n = G * sizeof(T) > 16 ? 16 / sizeof(T) : G;
#pragma unroll
  for (int g = 0; g < G; g += n) {
    const auto vector = load<Vector<T, n>>(from + g);
#pragma unroll
    for (int i = 0; i < n; i++) x[g + i] = vector[i];
  }
}

template <int G, typename T>
FLAMINGO_DEVICE void store_group(T* to, const float* x) {
  if constexpr (sizeof(T) == 2 && G > 1) {
    Vector<uint32_t, G / 2> pairs;
#pragma unroll
    for (int i = 0; i < G / 2; i++) pairs.element[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    store(to, pairs);
  } else {
    constexpr int n = G * sizeof(T) > 16 ? 16 / sizeof(T) : G;
#pragma unroll
    for (int g = 0; g < G; g += n) {
      Vector<T, n> vector;
#pragma unroll
      for (int i = 0; i < n; i++) vector.set(i, x[g + i]);
      store(to + g, vector);
    }
  }
}

// Of a row whose columns lie `step` apart, which is 1 if they are in groups. Columns that are not there are 0.
template <int N, int G, typename T>
FLAMINGO_DEVICE void load_columns(float (&x)[N], const T* row, const Columns<N, G>& columns, int64_t step = 1) {
#pragma unroll
  for (int g = 0; g < N; g += G) {
    const int at = columns.at(g);
    if (at < columns.count) {
      load_group<G>(&x[g], row + (G > 1 ? at : at * step));
    } else {
#pragma unroll
      for (int i = 0; i < G; i++) x[g + i] = 0.f;
    }
  }
}

template <int N, int G, typename T>
FLAMINGO_DEVICE void store_columns(T* row, const float (&x)[N], const Columns<N, G>& columns) {
#pragma unroll
  for (int g = 0; g < N; g += G) {
    const int at = columns.at(g);
    if (at < columns.count) store_group<G>(row + at, &x[g]);
  }
}

// ---- parameters, whose type is known when the kernel runs -----------------------------------------------------------

// f(pointer to the elements, of their type)
template <typename F>
FLAMINGO_DEVICE void with_elements(const Array& array, F f) {
  switch (array.type) {
    case Element::fp32:
      return f(static_cast<float*>(array.data));
    case Element::bf16:
      return f(static_cast<__nv_bfloat16*>(array.data));
    case Element::fp16:
      return f(static_cast<__half*>(array.data));
  }
}

// `otherwise` for all where there is no array.
template <int N, int G>
FLAMINGO_DEVICE void load_parameter(float (&x)[N], const Array& array, const Columns<N, G>& columns, float otherwise) {
  if (array.data == nullptr) {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = otherwise;
  } else {
    with_elements(array, [&](const auto* elements) { load_columns(x, elements, columns); });
  }
}

// Without a branch for each type: a compiler would write a kernel for all that may be of one.
FLAMINGO_DEVICE float load_number(const Array& array, int64_t i) {
  if (array.type == Element::fp32) return load<float>(static_cast<const float*>(array.data) + i);
  const uint16_t bits = load<uint16_t>(static_cast<const uint16_t*>(array.data) + i);
  const float of_bf16 = to_float(bits_as<__nv_bfloat16>(bits)), of_fp16 = to_float(bits_as<__half>(bits));
  return array.type == Element::bf16 ? of_bf16 : of_fp16;
}

FLAMINGO_DEVICE void store_number(const Array& array, int64_t i, float x) {
  with_elements(array, [&](auto* elements) { store(elements + i, from_float<std::decay_t<decltype(*elements)>>(x)); });
}

// ---- teams: the threads that share a row ----------------------------------------------------------------------------

// The block's threads in teams of `size`, a power of two from 32 on that divides the block.
struct Team {
  int size, index, rank, count;

  FLAMINGO_DEVICE explicit Team(int size)
      : size(size), index(threadIdx.x / size), rank(threadIdx.x % size), count(blockDim.x / size) {}
};

// Sums of what the threads of a team have, to all of them, in a fixed order. All threads of a block call it.
template <int N>
struct TeamSums {
  static constexpr int kFloats = 2 * 32 * N;  // of shared memory; the halves take turns, which saves a barrier

  float* memory;
  int half = 0;

  template <int n>
  FLAMINGO_DEVICE void operator()(float (&x)[n], int size) {
    static_assert(n <= N);
    within(x, 16);
    if (size == 32) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = size / 32;
    float* const sums = memory + half * 32 * N;
    half ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < n; k++) store_shared(sums + 32 * k + warp, x[k]);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < n; k++) x[k] = load_shared<float>(sums + 32 * k + warp / warps * warps + lane % warps);
    within(x, warps / 2);
  }

 private:
  template <int n>
  static FLAMINGO_DEVICE void within(float (&x)[n], int widest) {
    for (int offset = widest; offset > 0; offset /= 2) {
#pragma unroll
      for (int k = 0; k < n; k++) x[k] += __shfl_xor_sync(0xffffffffu, x[k], offset);
    }
  }
};

// ---- launchers ------------------------------------------------------------------------------------------------------

// f(a value of the type of the elements)
template <typename F>
void with_type(Element type, F f) {
  switch (type) {
    case Element::fp32:
      return f(float{});
    case Element::bf16:
      return f(__nv_bfloat16{});
    case Element::fp16:
      return f(__half{});
  }
  throw std::invalid_argument("elements of an unknown type");
}

inline int size_of(Element type) { return type == Element::fp32 ? 4 : 2; }

// Whether rows can be read and written in vectors of 16 bytes; also where there are none.
inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
inline bool aligned(const Rows& rows, int64_t count) {
  return aligned(rows.data) && (count == 1 || rows.stride * size_of(rows.type) % 16 == 0);
}

// Columns in a group of rows of these types.
template <typename... T>
constexpr int kGroup = 16 / std::max({sizeof(T)...});

// f(group) with the number of columns in a group as a type: G, or 1 without groups
template <int G, typename F>
void with_group(bool in_groups, F f) {
  if (in_groups) {
    f(std::integral_constant<int, G>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// The fewest threads, a power of two from 32 to `most`, of which each has at most `held` of the columns, if `most` can.
inline int team_for(int64_t columns, int held, int most) {
  int size = 32;
  while (size < most && int64_t{size} * held < columns) size *= 2;
  return size;
}

// Multiprocessors of the stream's device. The emulator's are few, so that blocks take several tiles.
inline int processors(Stream stream) {
#ifdef FLAMINGO_EMULATED
  return 4;
#else
  int count = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, stream.device);
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
  return count;
#endif
}

}  // namespace flamingo
