#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "case.h"
#include "counters.h"

// 0: right; 1: a wrong result; 2: an error of the emulator
static int run(const Case& chosen, uint64_t seed) try {
  cusim::options.seed = seed;
  cusim::counters = {};
  const bool right = chosen.run();
  printf("seed %lu: %s\n", static_cast<unsigned long>(seed), right ? "right" : "wrong result");
#define PRINT(name) printf("%s=%lu\n", #name, static_cast<unsigned long>(cusim::counters.name));
  CUSIM_COUNTERS(PRINT)
#undef PRINT
  return !right;
} catch (const cusim::Error& error) {
  printf("seed %lu: %s\n", static_cast<unsigned long>(seed), error.what());
  return 2;
}

int main(int count, char** words) {
  for (const Case& one : cases()) {
    if (count < 2) puts(one.name);
    if (count < 2 || strcmp(one.name, words[1])) continue;
    int worst = 0;
    for (int i = 2; i < count; i++) worst = std::max(worst, run(one, strtoull(words[i], nullptr, 10)));
    return worst;
  }
  return count < 2 ? 0 : 64;
}
