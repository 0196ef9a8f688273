// Elements and the 16-byte vectors that they travel in: T is __nv_bfloat16, __half or float; arithmetic is in fp32.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/ptx.cuh"

namespace flamingo {

template <typename To, typename From>
FLAMINGO_DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

FLAMINGO_DEVICE float to_float(float x) { return x; }
FLAMINGO_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
FLAMINGO_DEVICE float to_float(__half x) { return __half2float(x); }

template <typename T>
FLAMINGO_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// Two 16-bit elements in one register, the first in the lower half.
template <typename T>
FLAMINGO_DEVICE uint32_t pack(float first, float second) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return bits_as<uint32_t>(__floats2bfloat162_rn(first, second));
  } else {
    static_assert(std::is_same_v<T, __half>);
    return bits_as<uint32_t>(__floats2half2_rn(first, second));
  }
}

// Elements that lie side by side and are loaded and stored as one; N · sizeof(T) is at most 16, and the address lies on
// a multiple of it.
template <typename T, int N = 16 / sizeof(T)>
struct alignas(N * sizeof(T)) Vector {
  static constexpr int kSize = N;
  T element[N];

  FLAMINGO_DEVICE float operator[](int i) const { return to_float(element[i]); }
  FLAMINGO_DEVICE void set(int i, float value) { element[i] = from_float<T>(value); }
};

#ifdef FLAMINGO_EMULATED
// One access of a thread, which the emulator counts and checks.
template <typename V, typename T>
inline V load(const T* from, cusim::Site site = cusim::Site::here()) {
  cusim::global_load(from, sizeof(V), site);
  return *reinterpret_cast<const V*>(from);
}
template <typename V, typename T>
inline void store(T* to, const V& value, cusim::Site site = cusim::Site::here()) {
  cusim::global_store(to, sizeof(V), site);
  *reinterpret_cast<V*>(to) = value;
}
template <typename V>
inline V load_shared(const void* from, cusim::Site site = cusim::Site::here()) {
  cusim::shared_load(from, sizeof(V), site);
  return *static_cast<const V*>(from);
}
template <typename V>
inline void store_shared(void* to, const V& value, cusim::Site site = cusim::Site::here()) {
  cusim::shared_store(to, sizeof(V), site);
  *static_cast<V*>(to) = value;
}
#else
// What the machine moves as one.
template <int bytes>
using Bits =
    std::conditional_t<bytes == 16, uint4,
                       std::conditional_t<bytes == 8, uint2, std::conditional_t<bytes == 4, uint32_t, uint16_t> > >;

// Of global memory, as one V of 1 to 16 bytes: load<Vector<T>>(p), store(p, vector), load<int32_t>(p).
template <typename V, typename T>
FLAMINGO_DEVICE V load(const T* from) {
  const auto bits = *reinterpret_cast<const Bits<sizeof(V)>*>(from);  // what a reference names is copied byte by byte
  return bits_as<V>(bits);
}
template <typename V, typename T>
FLAMINGO_DEVICE void store(T* to, const V& value) {
  const auto bits = bits_as<Bits<sizeof(V)> >(value);
  if constexpr (sizeof(V) >= 8) {
    ptx::store_global(to, bits);
  } else {
    *reinterpret_cast<Bits<sizeof(V)>*>(to) = bits;
  }
}
// Of shared memory.
template <typename V>
FLAMINGO_DEVICE V load_shared(const void* from) {
  return load<V>(static_cast<const unsigned char*>(from));
}
template <typename V>
FLAMINGO_DEVICE void store_shared(void* to, const V& value) {
  *static_cast<Bits<sizeof(V)>*>(to) = bits_as<Bits<sizeof(V)> >(value);
}
#endif

}  // namespace flamingo
