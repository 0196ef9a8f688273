// Small kernels, right ones and wrong ones. Each is a case of one program: `planted NAME SEED...`.
#pragma once

#include <cusim.h>

#include <vector>

struct Case {
  const char* name;
  bool (*run)();  // launches, and says whether what came out is right
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Register {
  Register(const char* name, bool (*run)()) { cases().push_back({name, run}); }
};

#define CASE(name)                             \
  static bool name();                          \
  static const Register name##_(#name, &name); \
  static bool name()

template <class T>
T* shared() {
  return static_cast<T*>(cusim::shared_memory());
}
