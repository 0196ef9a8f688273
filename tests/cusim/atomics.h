// Atomic operations and fences. Atomics are relaxed, as CUDA's are: only fences order other memory around them.
#pragma once

#include <cstring>
#include <type_traits>

#include "runtime.h"

namespace cusim {

void fence();  // __threadfence, and the narrower and wider ones
// Tells of an atomic operation before it happens, so that ThreadSanitizer knows what the fences around it order.
void before_atomic(void* address);

template <class T, class Operation>
inline T atomic(T* address, Operation operation) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  before_atomic(address);
  auto* bits = reinterpret_cast<Bits*>(address);
  Bits seen = __atomic_load_n(bits, __ATOMIC_RELAXED), wanted;
  T before;
  do {
    memcpy(&before, &seen, sizeof(T));
    const T after = operation(before);
    memcpy(&wanted, &after, sizeof(T));
  } while (!__atomic_compare_exchange_n(bits, &seen, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

}  // namespace cusim

inline void __threadfence() { cusim::fence(); }
inline void __threadfence_block() { cusim::fence(); }
inline void __threadfence_system() { cusim::fence(); }

template <class T>
inline T atomicAdd(T* address, std::common_type_t<T> value) {
  return cusim::atomic(address, [=](T before) -> T { return before + value; });
}
template <class T>
inline T atomicSub(T* address, std::common_type_t<T> value) {
  return cusim::atomic(address, [=](T before) -> T { return before - value; });
}
template <class T>
inline T atomicMin(T* address, std::common_type_t<T> value) {
  return cusim::atomic(address, [=](T before) { return before < value ? before : value; });
}
template <class T>
inline T atomicMax(T* address, std::common_type_t<T> value) {
  return cusim::atomic(address, [=](T before) { return before > value ? before : value; });
}
template <class T>
inline T atomicAnd(T* address, std::common_type_t<T> value) {
  return cusim::atomic(address, [=](T before) -> T { return before & value; });
}
template <class T>
inline T atomicOr(T* address, std::common_type_t<T> value) {
  return cusim::atomic(address, [=](T before) -> T { return before | value; });
}
template <class T>
inline T atomicXor(T* address, std::common_type_t<T> value) {
  return cusim::atomic(address, [=](T before) -> T { return before ^ value; });
}
template <class T>
inline T atomicExch(T* address, std::common_type_t<T> value) {
  return cusim::atomic(address, [=](T) { return value; });
}
template <class T>
inline T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return cusim::atomic(address, [=](T before) { return before == expected ? value : before; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return cusim::atomic(address, [=](unsigned before) { return before >= last ? 0u : before + 1; });
}
