// Launches the backward kernels of masked cross-attention.

#include "cuda/masked_cross_attention_backward.cuh"
#include "cuda/masked_cross_attention_checks.cuh"

namespace flamingo {

void masked_cross_attention_backward(Precision precision, const MaskedBackward& call, Stream stream) {
  check_masked(precision, call.size, {{"do", call.grad}, {"q", call.q}, {"k", call.k}, {"v", call.v}});
  const MaskedSizes& size = call.size;
  const int64_t blocks = ceil_div(size.K, kBackwardKeys);
  dispatch(kMaskedOp, precision, size.D, [&](auto p, auto d) {
    using Prepare = MaskedPrepareTiling;
    using Tiling = MaskedBackwardTiling<p(), d()>;
    launch<masked_cross_attention_bwd_prepare_kernel<Element<p()>>>(
        "masked_cross_attention_bwd_prepare_kernel",
        ceil_div(blocks, Prepare::kBlocksOfKeys) * size.B + ceil_div(size.B * size.H * size.T, Prepare::kRows),
        Prepare::kThreads, Prepare::kBytes, stream, call);
    launch<masked_cross_attention_bwd_kernel<p(), d()>>(
        "masked_cross_attention_bwd_kernel",
        blocks * size.G * (size.B / size.beams) +
            ceil_div(size.T * (size.H / size.G), Tiling::kOwned) * size.G * size.B,
        Tiling::kThreads, Tiling::kBytes, stream, call);
  });
}

}  // namespace flamingo
