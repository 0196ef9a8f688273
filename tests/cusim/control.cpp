// The emulator's settings and counters for a caller in another language.
#include <iterator>

#include "counters.h"
#include "runtime.h"

namespace cusim {
Counters counters;
}

#define CUSIM_EXPORT extern "C" __attribute__((visibility("default")))

CUSIM_EXPORT void cusim_configure(uint64_t seed, int order) {
  cusim::options = {seed, static_cast<cusim::Order>(order)};
}

CUSIM_EXPORT void cusim_reset_counters() { cusim::counters = {}; }

// The name of counter `index` and its value; null behind the last.
CUSIM_EXPORT const char* cusim_counter(int index, uint64_t* value) {
  struct Named {
    const char* name;
    uint64_t cusim::Counters::* member;
  };
#define CUSIM_NAME(name) {#name, &cusim::Counters::name},
  static const Named all[] = {CUSIM_COUNTERS(CUSIM_NAME)};
#undef CUSIM_NAME
  if (index < 0 || index >= static_cast<int>(std::size(all))) return nullptr;
  *value = cusim::counters.*all[index].member;
  return all[index].name;
}
