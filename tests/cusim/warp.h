// Shuffles, votes and reductions of a warp.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "runtime.h"

namespace cusim {

template <class T>
inline T from_slot(const Slots& slots, int lane) {
  T value;
  memcpy(&value, slots.lane[lane], sizeof(T));
  return value;
}

template <class T>
inline T shuffle(uint32_t mask, T value, int source, const char* operation, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(Slots::lane[0]));
  const Slots& slots = collective(mask, operation, &value, sizeof(T), nullptr, site);
  if (!(mask >> source & 1))
    fail("%s:%d: %s reads lane %d, which is not in the mask %08x", site.file, site.line, operation, source, mask);
  return from_slot<T>(slots, source);
}

template <class T, class Operation>
inline T reduce(uint32_t mask, T value, const char* name, Operation operation, Site site) {
  const Slots& slots = collective(mask, name, &value, sizeof(T), nullptr, site);
  bool first = true;
  for (int lane = 0; lane < 32; lane++) {
    if (!(mask >> lane & 1)) continue;
    const T other = from_slot<T>(slots, lane);
    value = first ? other : operation(value, other);
    first = false;
  }
  return value;
}

}  // namespace cusim

// `width` cuts the warp into parts of their own; a source outside of the part is the lane itself.
template <class T>
inline T __shfl_sync(uint32_t mask, T value, int source, int width = 32, cusim::Site site = cusim::Site::here()) {
  const int start = cusim::current->lane & ~(width - 1);
  return cusim::shuffle(mask, value, start | (source & (width - 1)), "shfl.idx", site);
}

template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, cusim::Site site = cusim::Site::here()) {
  const int lane = cusim::current->lane, last = lane | (width - 1), source = lane ^ bits;
  return cusim::shuffle(mask, value, source <= last ? source : lane, "shfl.bfly", site);
}

template <class T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32, cusim::Site site = cusim::Site::here()) {
  const int lane = cusim::current->lane, last = lane | (width - 1), source = lane + static_cast<int>(by);
  return cusim::shuffle(mask, value, source <= last ? source : lane, "shfl.down", site);
}

template <class T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32, cusim::Site site = cusim::Site::here()) {
  const int lane = cusim::current->lane, start = lane & ~(width - 1), source = lane - static_cast<int>(by);
  return cusim::shuffle(mask, value, source >= start ? source : lane, "shfl.up", site);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, cusim::Site site = cusim::Site::here()) {
  const uint32_t bit = predicate ? 1u << cusim::current->lane : 0u;
  return cusim::reduce(mask, bit, "vote.ballot", [](uint32_t a, uint32_t b) { return a | b; }, site);
}

inline int __any_sync(uint32_t mask, int predicate, cusim::Site site = cusim::Site::here()) {
  return cusim::reduce(mask, predicate != 0, "vote.any", [](bool a, bool b) { return a || b; }, site);
}

inline int __all_sync(uint32_t mask, int predicate, cusim::Site site = cusim::Site::here()) {
  return cusim::reduce(mask, predicate != 0, "vote.all", [](bool a, bool b) { return a && b; }, site);
}

// redux.sync, for int and unsigned
template <class T>
inline T __reduce_add_sync(uint32_t mask, T value, cusim::Site site = cusim::Site::here()) {
  return cusim::reduce(mask, value, "redux.add", [](uint32_t a, uint32_t b) { return static_cast<T>(a + b); }, site);
}

template <class T>
inline T __reduce_min_sync(uint32_t mask, T value, cusim::Site site = cusim::Site::here()) {
  return cusim::reduce(mask, value, "redux.min", [](T a, T b) { return std::min(a, b); }, site);
}

template <class T>
inline T __reduce_max_sync(uint32_t mask, T value, cusim::Site site = cusim::Site::here()) {
  return cusim::reduce(mask, value, "redux.max", [](T a, T b) { return std::max(a, b); }, site);
}

inline uint32_t __reduce_and_sync(uint32_t mask, uint32_t value, cusim::Site site = cusim::Site::here()) {
  return cusim::reduce(mask, value, "redux.and", [](uint32_t a, uint32_t b) { return a & b; }, site);
}

inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value, cusim::Site site = cusim::Site::here()) {
  return cusim::reduce(mask, value, "redux.or", [](uint32_t a, uint32_t b) { return a | b; }, site);
}

inline uint32_t __reduce_xor_sync(uint32_t mask, uint32_t value, cusim::Site site = cusim::Site::here()) {
  return cusim::reduce(mask, value, "redux.xor", [](uint32_t a, uint32_t b) { return a ^ b; }, site);
}
