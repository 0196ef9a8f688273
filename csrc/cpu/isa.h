// Which instruction set the kernels use on this machine.
#pragma once

namespace flamingo {

enum class Isa { kDefault, kAvx2, kAvx512 };

// ATen's choice, which ATEN_CPU_CAPABILITY overrides.
Isa isa();

// "DEFAULT", "AVX2" or "AVX512".
const char* isa_name();

// Whether the CPU rounds fp32 to bf16 in one instruction.
extern const bool kRoundsToBf16;

// Whether matmuls on bf16 tiles run in bf16: the CPU multiplies bf16, and this torch has oneDNN's kernels for it, not
// switched off. Otherwise bf16 tiles are widened to fp32.
bool narrow_tiles();

}  // namespace flamingo
