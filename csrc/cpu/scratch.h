// Memory that a kernel works in for one call.
#pragma once

#include <cstdint>

namespace flamingo {

// 64-byte aligned memory, of any content. The system hands out fresh memory in pages of 4 KiB, each at the cost of a
// fault: for a packed matrix up to a tenth of the matmul that it is packed for. So the process keeps some of what is
// given back, 128 MiB at most, for the next call.
void* take_scratch(int64_t bytes);
void give_scratch(void* scratch);

}  // namespace flamingo
