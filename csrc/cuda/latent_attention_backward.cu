// Launches the backward kernels of latent attention.

#include "cuda/latent_attention_backward.cuh"
#include "cuda/latent_attention_checks.cuh"

namespace flamingo {

void latent_attention_backward(Precision precision, const LatentBackward& call, Stream stream) {
  check_latent(precision, call.in, {{"do", call.grad}});
  const LatentSizes& size = call.in.size;
  dispatch(kLatentOp, precision, size.D, [&](auto p, auto d) {
    using Tiling = LatentBackwardTiling<p(), d()>;
    launch<latent_attention_bwd_kernel<p(), d()>>("latent_attention_bwd_kernel",
                                                  int64_t{latent_tiles(size)} * size.splits * size.G * size.N,
                                                  Tiling::kThreads, Tiling::kBytes, stream, call);
  });
}

}  // namespace flamingo
