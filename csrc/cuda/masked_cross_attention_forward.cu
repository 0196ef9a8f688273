// Launches the forward kernels of masked cross-attention.

#include "cuda/dispatch.cuh"
#include "cuda/masked_cross_attention_checks.cuh"
#include "cuda/masked_cross_attention_forward.cuh"

namespace flamingo {

void masked_cross_attention_forward(Precision precision, const MaskedForward& call, Stream stream) {
  check_masked(precision, call.size, {{"q", call.q}, {"k", call.k}, {"v", call.v}});
  const MaskedSizes& size = call.size;
  dispatch(kMaskedOp, precision, size.D, [&](auto p, auto d) {
    using Tiling = MaskedForwardTiling<p(), d()>;
    const int R = size.H / size.G;
    const int64_t blocks = ceil_div(size.T * R, masked_forward_step(Tiling::kRows, R)) * size.G * size.B;
    launch<masked_cross_attention_fwd_kernel<p(), d()>>("masked_cross_attention_fwd_kernel", blocks, Tiling::kThreads,
                                                        Tiling::kBytes, stream, call);
  });
}

}  // namespace flamingo
