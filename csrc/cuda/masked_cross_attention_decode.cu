// Launches the forward kernels of masked cross-attention for one token a row.

#include "cuda/masked_cross_attention_checks.cuh"
#include "cuda/masked_cross_attention_decode.cuh"

namespace flamingo {

void masked_cross_attention_decode(Precision precision, const MaskedForward& call, Stream stream) {
  check_masked(precision, call.size, {{"q", call.q}, {"k", call.k}, {"v", call.v}});
  const MaskedSizes& size = call.size;
  dispatch(kMaskedOp, precision, size.D, [&](auto p, auto d) {
    using Tiling = MaskedDecodeTiling<p(), d()>;
    const int64_t blocks = ceil_div(size.beams * (size.H / size.G), Tiling::kRows) * size.G * (size.B / size.beams);
    launch<masked_cross_attention_decode_kernel<p(), d()>>("masked_cross_attention_decode_kernel", blocks,
                                                           Tiling::kThreads, Tiling::kBytes, stream, call);
  });
}

}  // namespace flamingo
