#include "isa.h"

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>

#include <string>

namespace flamingo {
namespace {

bool cpu_has_avx512_bf16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool cpu_multiplies_bf16() { return isa() == Isa::kAvx512 && cpu_has_avx512_bf16(); }

// ATen does not say whether it was built with oneDNN's micro-kernels, but calling one that is missing throws.
bool brgemm_takes_vnni() {
  const at::BFloat16 a[2] = {1.f, 1.f}, b[2] = {1.f, 1.f};
  float c[1] = {0.f};
  try {
    at::native::cpublas::brgemm(1, 1, 2, 2, 1, 1, false, a, b, c, true);
    at::native::cpublas::brgemm_release(true);
  } catch (const std::exception&) {
    return false;
  }
  return c[0] == 2.f;
}

}  // namespace

const bool kRoundsToBf16 = cpu_has_avx512_bf16();

Isa isa() {
  static const Isa value = [] {
    const std::string name = at::get_cpu_capability();
#if defined(__x86_64__)
    if (name.rfind("AVX512", 0) == 0) return Isa::kAvx512;
    if (name == "AVX2") return Isa::kAvx2;
#endif
    return Isa::kDefault;
  }();
  return value;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::kAvx512:
      return "AVX512";
    case Isa::kAvx2:
      return "AVX2";
    default:
      return "DEFAULT";
  }
}

bool narrow_tiles() {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool value = cpu_multiplies_bf16() && brgemm_takes_vnni();
  return value;
}

}  // namespace flamingo
